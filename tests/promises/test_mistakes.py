"""What users do wrong is one sentence that names what was given and what to do, and changes nothing."""

from pathlib import Path

import pytest
from mistakes import Mistakes, Stage, commands, compressing, cutting, files, models, searching, settings, snapshot

from dnal_nni import DNALError

TABLES: list[Mistakes] = [
    *(models.MODELS, models.INPUTS, settings.BUDGETS, settings.SETTINGS, settings.LISTS),
    *(searching.SEARCHES, cutting.CUTS, compressing.CALLS, files.FILES, files.REPORTS, commands.COMMANDS),
]
MISTAKES = [(name, *mistake) for table in TABLES for name, mistake in table.items()]


def test_the_list_is_long() -> None:
    assert len(MISTAKES) >= 120


@pytest.mark.filterwarnings("ignore")  # of what torch's own quantization, tracing and compiling warn
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0])
def test_a_mistake_is_a_sentence(mistake: tuple[str, object, str], work: Path) -> None:
    _, do, expected = mistake
    stage = Stage()
    with pytest.raises(DNALError) as caught:
        do(stage)
    said = str(caught.value)
    place = 0
    for part in expected.split("..."):
        assert part in said[place:], f"{part!r} is not (any more) in {said!r}"
        place = said.index(part, place) + len(part)
    assert "\n" not in said and " at 0x" not in said and len(said) < 500, said
    assert snapshot(stage.model) == stage.before
