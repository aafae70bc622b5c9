"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from zinit.errors import ConfigError

SEEDS = 2**63  # how many there are, see `zinit.validation.Seed`


def _check_seed(value: int) -> int:
    """As the setting is checked, in its words: torch takes no seed beyond these."""
    from zinit.validation import Seed, SettingType

    return SettingType.of(Seed).check("--seed", value)


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
RunDirectory = Annotated[str, typer.Argument(help="The folder of a run, or of a checkpoint in it.", metavar="RUN_DIR")]
Options = Annotated[
    list[str] | None,
    typer.Option("-o", "--option", metavar="KEY=VALUE", help="Any setting: -o prefix.length=20 -o train.epochs=3."),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy. The paper's: 0.1.", min=0.0)]
TopP = Annotated[float, typer.Option(help="Nucleus sampling. The paper's: 0.75.", min=0.0, max=1.0)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
Frozen = Annotated[bool, typer.Option("--frozen", help="Without the adapter, for comparison.")]
SamplingSeed = Annotated[int, typer.Option(help="Of the sampling.", callback=_check_seed)]
System = Annotated[str, typer.Option(help="What the assistant is told before all else.")]
Experts = Annotated[str | None, typer.Option(help="What writes about images: ocr,caption:RUN; see 'zinit ls experts'.")]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", "--audio", "--video", "--vector", help="A file for the run's encoder; repeatable."),
]
Index = Annotated[
    str | None, typer.Option(help="Mix what the adapter sees with the nearest keys of this index: 'zinit index build'.")
]
RetrievalOptions = Annotated[
    list[str] | None,
    typer.Option(
        "-o", "--option", metavar="KEY=VALUE", help="Of --index: -o retrieval.weight=0.5, neighbours=10, sharpness=20."
    ),
]


def check_page_sampling(sampling: dict[str, Any]) -> None:
    """What the page of --web starts with is within what its server takes: every message would be refused otherwise.

    Args:
        sampling: by the names of the server's API.

    Raises:
        ConfigError: naming the first option that is not.
    """
    from pydantic import ValidationError

    from zinit.serve.bodies import Asking

    try:
        Asking(model="any", **sampling)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        name = str(found["loc"][0])
        option = {"max_tokens": "max-new-tokens"}.get(name, name.replace("_", "-"))
        expected = found["msg"].removeprefix("Input should be ")
        raise ConfigError(
            f"--{option} is {sampling[name]}, and the page of --web takes a value that is {expected}. Give such a one, "
            f"or leave it out."
        ) from None


def check_retrieval(index: str | None, options: list[str] | None) -> dict[str, Any]:
    """Options of retrieval as functions take them; refused without an index."""
    if options and index is None:
        raise ConfigError(f"-o {options[0]} is for cache retrieval: name an index, --index FOLDER, or leave it out.")
    return {"index": index, "retrieval": tuple(options or ())}
