"""The names that users of a model hub know, as methods of `ScLong`: load, save and publish.

They call the public functions of `sclong_ds`, which know the files; a model is arithmetic alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import sclong_ds

if TYPE_CHECKING:
    import torch


class Pretrained:
    """Loads, saves and publishes a model, in the layout of the Hugging Face hub."""

    folder: Path | None = None
    """The folder that the model was loaded from; None: it was made by hand."""

    @classmethod
    def from_pretrained(cls, place: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Load a model; all is that of `sclong_ds.load_model`.

        Args:
            place: A folder, hf://ORG/NAME[@REVISION] or https://...
            device: Where the model goes.
        """
        return cast(Self, sclong_ds.load_model(place, device=device))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as it is now into a new folder; see `sclong_ds.save_pretrained`.

        Args:
            folder: To make.
        """
        sclong_ds.save_pretrained(cast(sclong_ds.ScLong, self), folder)

    def push_to_hub(self, name: str, *, licence: str | None = None, private: bool = False) -> str:
        """Publish the model as it is now; see `sclong_ds.push_to_hub`.

        Args:
            name: ORG/NAME of the repository.
            licence: Identifier for the card, such as cc-by-4.0.
            private: Whether a new repository is private.

        Returns:
            The address of the commit.
        """
        model = cast(sclong_ds.ScLong, self)
        return sclong_ds.push_to_hub(model, name, licence=licence, private=private)
