"""Write docs/api.md from the docstrings:  python docs/make_api.py"""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import dnal_nni
from dnal_nni.channels.flow import Flow, Labels, Operation
from dnal_nni.channels.groups import ChannelGroup, Member
from dnal_nni.modules.gates import ScaledSigmoidGate
from dnal_nni.plan import Plan
from dnal_nni.report.interventions import Interventions
from dnal_nni.report.record import GroupReport, Report
from dnal_nni.search.bounded import Bound
from dnal_nni.search.loop import Search
from dnal_nni.search.settings import Setting
from dnal_nni.session import Method, Session

HEAD = """# API

Written by `docs/make_api.py` from the docstrings; a test compares. The first part is what `from dnal_nni import ...`
gives, the second what these hand out, and what they are made of: `dnal_nni.plan.Plan` and `dnal_nni.session.Session`
search and cut without NNI.
"""
HANDED_OUT = (
    *(Search, Plan, Setting, Session, Method, ChannelGroup, Member, ScaledSigmoidGate, Report, GroupReport),
    *(Flow, Labels, Operation, Interventions, Bound),
)
METHODS = {"search", "compress", "harden", "speedup", "carry_optimizer", "unwrap_model", "wrap_model", "update_masks"}
METHODS |= {"get_masks", "state_dict", "load_state_dict", "save_checkpoint", "load_checkpoint", "from_compressor"}
METHODS |= {"report", "groups", "gates", "step", "penalised", "restore", "to_dict", "from_dict", "to_json", "to_html"}
METHODS |= {"choose", "dependency_groups", "slim_model", "list_models"}
METHODS |= {"to_tensorboard", "plot_widths", "rows"}
METHODS |= {"repair", "with_arguments", "count", "facts", "bound", "note"}
METHODS |= {"of", "put", "freeze", "couple", "mix", "meet", "argument", "gives_zero"}
METHODS |= {"plan", "session", "active", "sizes", "by_group", "slim", "measured", "attach", "detach", "start", "stop"}


def signature(thing: Any) -> str:
    """With the annotations as they are written, one argument a line where it gets long."""
    shown, keyword = [], False
    for p in inspect.signature(thing).parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not keyword:
            shown, keyword = [*shown, "*"], True
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        shown.append(f"{star}{p.name}: {p.annotation}{default}")
    result = inspect.signature(thing).return_annotation
    arrow = "" if result in (inspect.Signature.empty, None, "None") else f" -> {result}"
    line = f"({', '.join(shown)}){arrow}"
    return line if len(line) < 90 else "(\n" + "".join(f"    {entry},\n" for entry in shown) + f"){arrow}"


def entry(level: str, name: str, thing: Any) -> str:
    doc = inspect.cleandoc(thing.__doc__ or "")
    plain = isinstance(thing, property) or inspect.isclass(thing) and issubclass(thing, Exception)
    form = "" if plain else signature(thing)
    return f"{level} {name}\n\n```text\n{name}{form}\n```\n\n```text\n{doc}\n```\n"


def described(name: str, thing: Any) -> list[str]:
    parts = [entry("##", name, thing)]
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for method, value in vars(thing).items():
            value = value.__func__ if isinstance(value, classmethod) else value
            if method in METHODS and value.__doc__ and not dataclasses.is_dataclass(value):
                parts.append(entry("###", f"{name}.{method}", value))
    return parts


def page() -> str:
    parts = [HEAD]
    strategies = [name for name in dir(dnal_nni) if name.endswith("Strategy")]  # which need pytorch_lightning
    for name in sorted([*dnal_nni.__all__, *strategies]):
        parts += described(name, getattr(dnal_nni, name))
    for thing in HANDED_OUT:
        parts += described(thing.__name__, thing)
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(page())
