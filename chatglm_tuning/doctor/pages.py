"""The page of an error code, as it lies in docs/errors or beside this module in an installed package."""

import re
from difflib import get_close_matches
from pathlib import Path

from chatglm_tuning.config.doctor import Language
from chatglm_tuning.errors import UserError

_PLACES = (Path(__file__).with_name("pages"), Path(__file__).parents[2] / "docs" / "errors")
_CODE = re.compile(r"[A-Z]\d{3}")
_CHINESE_HEADING = "## 中文"


def pages_folder() -> Path:
    """Return the folder that has the pages."""
    return next(place for place in _PLACES if place.is_dir())


def codes() -> list[str]:
    """Return all codes that have a page, sorted."""
    return sorted(path.stem for path in pages_folder().glob("*.md") if _CODE.fullmatch(path.stem))


def page(code: str, language: Language) -> str:
    """Return one half of a code's page; raises UserError for a code that has none."""
    known, wanted = codes(), code.strip("[]").upper()
    if wanted not in known:
        near = get_close_matches(wanted, known, n=1)
        example = near[0] if near else "D103"
        raise UserError(
            f"{code} is no error code", code="X108", remedy=f"Write one as it is printed, such as {example}"
        )
    title, _, halves = (pages_folder() / f"{wanted}.md").read_text(encoding="utf-8").partition("\n\n")
    english, heading, chinese = halves.partition(_CHINESE_HEADING)
    half = f"{heading}{chinese}" if language == "zh" else english
    return f"{title.removeprefix('# ')} {half.strip().removeprefix('## ').removeprefix('中文：')}"
