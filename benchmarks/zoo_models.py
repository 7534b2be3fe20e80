"""The models of `zoo.py`: a list derived by rule, so that none is there because it happens to work.

1. torchvision: the 30 of the notes, which hold every classification family (module of ``torchvision.models``), and of
   segmentation, detection, video and optical flow every family, the remaining members where they differ in kind.
2. timm: the 55 of the notes (`NOTES`).
3. timm: of every other module of its registry the member with the fewest parameters, in its plain form (`FAMILIES`).
4. timm: where one module holds several architectures, one more member for each kind of block (`VARIANTS`).

`families` and `LEFT_OUT` let a test check 1 to 3 against what the installed packages offer. Inputs are 64 pixels wide,
or the smallest of 96, 128, ... that the model takes in eval and in train mode; batches of two. The Inceptions get 160:
at 96 their last maps are one pixel, and batch statistics of two values amplify rounding to 5e-10.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

LEFT_OUT = {
    # in their smallest member
    "timm.models.deepseek_vit": "412 M parameters",
    "timm.models.gemma4_vit": "167 M parameters",
    "torchvision.models.video.mvit": "its builders fix the input at 16x224x224: 45 s a forward pass in float64",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: unique here: the builder's, behind "timm_" for those of timm.
        source: "torchvision" or "timm".
        builder: the name in that package's registry.
        task: classification, segmentation, detection, video or flow.
        shape: of the input; for detection the images of the list are ``shape[1:]``.
        arguments: further arguments of the builder.
        heads: submodules whose outputs are compared as well.
        dtype: of the comparison.
    """

    name: str
    source: str
    builder: str
    task: str
    shape: tuple[int, ...]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heads: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64

    def build(self) -> nn.Module:
        """The model with random weights."""
        if self.source == "timm":
            import timm  # not needed to read the list

            return timm.create_model(self.builder, pretrained=False, **self.arguments)
        import torchvision

        backbone = {"weights_backbone": None} if self.task in ("segmentation", "detection") else {}
        return torchvision.models.get_model(self.builder, weights=None, **backbone, **self.arguments)

    def inputs(self, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """Positional arguments of its forward."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype)

        if self.task == "detection":
            return ([draw(*self.shape[1:]).sigmoid() for _ in range(self.shape[0])],)
        return tuple(draw(*self.shape) for _ in range(2 if self.task == "flow" else 1))


# name, or name:64 where the size is an argument of the builder (img_size), or name@224 where it must be that
NOTES = """
    resnetv2_50 resnetv2_50x1_bit ghostnet_100 ghostnetv2_100 hardcorenas_a tf_efficientnet_lite0 repvgg_a0
    dla34 dla60_res2net hrnet_w18_small res2net50_26w_4s resnest14d eca_nfnet_l0 convmixer_768_32 mobilevit_xxs
    cspresnet50 dpn68 regnety_002 ecaresnet26t gcresnet33ts vovnet39a mixnet_s mobileone_s0 gernet_s fbnetc_100
    convnextv2_atto starnet_s1@224 inception_next_atto tresnet_m tinynet_e legacy_xception densenetblur121d
    vit_tiny_patch16_224:64 nf_resnet26 edgenext_xx_small mobilevitv2_050 cspdarknet53 cs3darknet_m skresnet18
    seresnet18 xception41 ese_vovnet19b_dw rexnet_100 fastvit_t8 lcnet_050 mobilenetv4_conv_small hgnetv2_b0
    poolformer_s12 selecsls42b repghostnet_050 efficientnet_es mixer_s32_224:64 darknet53 resnet50d
    inception_v4@160
""".split()
FAMILIES = """
    beit_base_patch16_224:64 halonet_h1@256 cait_xxs24_224:64 coat_tiny:64 convit_tiny:64 cpubone_nano
    crossvit_tiny_240@240 csatv2 cspnext_tiny davit_tiny deit_tiny_patch16_224:64 efficientformer_l1@224
    efficientformerv2_s0:64 efficientvim_m1 efficientvit_b0 efficientvit_m0:224 eva02_tiny_patch14_224:64
    fasternet_t0 focalnet_tiny_srf gcvit_xxtiny:64 hiera_tiny_224:64 hieradet_small iformer_t
    inception_resnet_v2@160 inception_v3@160 lcnetv2_small levit_128s:224 lowformer_b0 mambaout_femto
    maxvit_pico_rw_256:64 mobilenetv5_base mvitv2_tiny:64 naflexvit_base_patch16_gap nasnetalarge nest_tiny:64
    nextvit_small pit_ti_224:64 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny repvit_m0_9 legacy_seresnet18
    sequencer2d_s:64 shvit_s1@224 swiftformer_xs:64 swin_tiny_patch4_window7_224:64 swinv2_tiny_window8_256:64
    swinv2_cr_tiny_224:64 tiny_vit_5m_224 tnt_s_patch16_224:64 twins_svt_small:64 vgg11_bn visformer_tiny:64
    vit_tiny_r_s16_p8_224:64 vit_srelpos_small_patch16_224:64 samvit_base_patch16_224:64 vitamin_small_224:64
    volo_d1_224:64 xcit_nano_12_p16_224:64
""".split()
VARIANTS = """
    botnet26t_256:64 lambda_resnet26t sehalonet33ts@256 bat_resnext26ts@256 eca_resnext26ts gcresnext26ts
    regnetz_b16 coat_lite_tiny:64 convnext_atto deit3_small_patch16_224:64 efficientnet_b0_gn
    efficientnet_cc_b0_4e efficientnetv2_rw_t mobilenetv2_035 spnasnet_100 efficientvit_l1 ghostnetv3_050
    hgnet_tiny levit_conv_128s:224 coatnet_pico_rw_224:64 maxxvitv2_nano_rw_256:64 caformer_s18 convformer_s18
    poolformerv2_s12 gmlp_ti16_224:64 resmlp_12_224:64 fbnetv3_b mobilenetv3_small_050 mobilenetv4_hybrid_medium
    dm_nfnet_f0 nf_regnet_b0 regnetv_040 regnetx_002 res2next50 resnet26d resnetblur18 resnetrs50
    seresnext26t_32x4d rexnetr_100 twins_pcpvt_small:64
""".split()


def _torchvision() -> list[Entry]:
    def add(task: str, names: str, *shape: int, heads: tuple[str, ...] = (), **arguments: Any) -> None:
        dtype = torch.float32 if task == "flow" else torch.float64  # RAFT makes float32 coordinates of its own
        for name in names.split():
            entries.append(Entry(name, "torchvision", name, task, (2, 3, *shape), arguments, heads, dtype))

    entries: list[Entry] = []
    plain = """
        alexnet vgg11 vgg16_bn resnet18 resnet50 densenet121 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
        efficientnet_b0 efficientnet_v2_s squeezenet1_1 shufflenet_v2_x1_0 mnasnet1_0 regnet_x_400mf regnet_y_400mf
        resnext50_32x4d wide_resnet50_2 convnext_tiny swin_t swin_v2_t
    """
    add("classification", plain, 64, 64)
    add("classification", "vit_b_16", 64, 64, image_size=64)
    add("classification", "maxvit_t", 224, 224)
    # their auxiliary heads run in train mode only; that of inception_v3 takes nothing smaller
    add("classification", "googlenet", 64, 64, init_weights=False)
    add("classification", "inception_v3", 299, 299, init_weights=False)
    add("segmentation", "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large", 64, 64, aux_loss=True)
    add("segmentation", "lraspp_mobilenet_v3_large", 64, 64)
    one_stage = ("head",)
    add("detection", "ssd300_vgg16 ssdlite320_mobilenet_v3_large", 128, 128, heads=one_stage)  # resized to 300, 320
    add("detection", "retinanet_resnet50_fpn fcos_resnet50_fpn", 96, 96, heads=one_stage, min_size=96, max_size=128)
    two_stage = ("rpn.head", "roi_heads.box_predictor")
    # few boxes: the heads behind them cost more than the rest
    small = {"min_size": 96, "max_size": 128, "rpn_post_nms_top_n_test": 32, "box_detections_per_img": 8}
    # and always as many: random weights would give another number of boxes, and of FLOPs, to every network
    small |= {"rpn_nms_thresh": 1.0, "box_score_thresh": 0.0, "box_nms_thresh": 1.0}
    faster = "fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn"
    add("detection", faster, 96, 96, heads=two_stage, **small)
    add("detection", "maskrcnn_resnet50_fpn", 96, 96, heads=(*two_stage, "roi_heads.mask_predictor"), **small)
    keypoints = (*two_stage, "roi_heads.keypoint_predictor")
    add("detection", "keypointrcnn_resnet50_fpn", 96, 96, heads=keypoints, **small)
    add("video", "r3d_18 mc3_18 r2plus1d_18 swin3d_t", 8, 64, 64)
    add("video", "s3d", 16, 224, 224)
    add("flow", "raft_small", 128, 128)
    return entries


def _timm(word: str) -> Entry:
    name, colon, option = word.partition(":")
    name, _, size = name.partition("@")
    pixels = int(option or size or 64)
    arguments = {"img_size": pixels} if colon else {}
    return Entry(f"timm_{name}", "timm", name, "classification", (2, 3, pixels, pixels), arguments)


MODELS = {e.name: e for e in [*_torchvision(), *map(_timm, [*NOTES, *FAMILIES, *VARIANTS])]}

EXPECTED_TO_SHRINK = frozenset(
    """
    alexnet vgg11 vgg16_bn resnet18 resnet50 densenet121 mobilenet_v2 mobilenet_v3_large efficientnet_b0 googlenet
    inception_v3 squeezenet1_1 shufflenet_v2_x1_0 mnasnet1_0 regnet_y_400mf regnet_x_400mf resnext50_32x4d
    mobilenet_v3_small convnext_tiny swin_t vit_b_16 efficientnet_v2_s fcn_resnet50 deeplabv3_mobilenet_v3_large
    lraspp_mobilenet_v3_large ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn wide_resnet50_2
    maxvit_t swin_v2_t
    """.split()
) | {_timm(word).name for word in NOTES}
"""The 85 of the notes, of which 80 shall lose a fifth of their FLOPs at the 30 % cut."""


def families() -> set[str]:
    """The modules of torchvision and timm that an entry, or a line of `LEFT_OUT`, answers for."""
    import timm.models
    import torchvision

    found = set(LEFT_OUT)
    for entry in MODELS.values():
        if entry.source == "timm":
            found.add(timm.models.model_entrypoint(entry.builder).__module__)
        else:
            found.add(torchvision.models.get_model_builder(entry.builder).__module__)
    return found
