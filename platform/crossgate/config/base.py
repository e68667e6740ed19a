"""What every section of a recipe has in common: number ranges, strict keys, field docstrings as help."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

NO_CREDENTIALS = "a URL without user name and password; put credentials into the environment"
# A port is digits: all else after a colon is the beginning of a password, which may hold an unquoted slash.
_CREDENTIALS = re.compile(r"://([^/?#]*@|[^/?#]*:(?!\d*([/?#]|$)))")


class CredentialsError(ValueError):
    """A URL holds some: nothing of what was found may be repeated."""


def has_credentials(url: str) -> bool:
    """Says whether a URL holds a user name or a password: it would be shown, stored and tracked with them."""
    return _CREDENTIALS.search(url) is not None


def _without_credentials(url: str) -> str:
    if has_credentials(url):
        raise CredentialsError(f"expected {NO_CREDENTIALS}")
    return url


FolderUrl = Annotated[str, AfterValidator(_without_credentials)]
"""A local path or URL of a folder of a store."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Config(BaseModel):
    """Common ground: unknown keys are errors, field docstrings are the help."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)
