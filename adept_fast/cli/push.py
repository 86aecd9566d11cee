"""`adept-fast push`: upload a tuned model to the hub of Hugging Face, or say what would be uploaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from adept_fast.errors import InputError
from adept_fast.settings import key_value
from adept_fast.settings.validation import declare

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Push:
    source: str = declare(meaning="the model to upload, as out/tuned")
    repo: str = declare(meaning="USER/NAME on the hub; it is created where there is none")
    private: bool | None = declare(None, meaning="for you alone to see; null: what your account or organisation does by default")
    revision: str | None = declare(None, meaning="branch to upload to; it is created where there is none")
    dry_run: bool = declare(False, meaning="say what would be uploaded, and upload nothing")


def run(name: str, words: Sequence[str]) -> str:
    """Check the model, list what is uploaded, upload it, and return where it is."""
    from huggingface_hub import constants, get_token

    from adept_fast.checkpoints import checkpoint
    from adept_fast.checkpoints.hub_upload import not_uploaded, planned_uploads, upload

    given = key_value.settings(Push, words)
    if given.repo.count("/") != 1:
        raise InputError(f"repo={given.repo}: give USER/NAME", "repo")
    model = checkpoint.resolve(given.source, name="source")
    uploads = planned_uploads(model)
    for each in uploads:
        changed = "" if each.content is None else "  without the paths of this machine"
        logger.info(f"{each.size / 1e6:12,.3f} MB  {each.name}{changed}")
    if left := not_uploaded(model, uploads):
        logger.info(f"not uploaded: {', '.join(left)}")
    total = f"{len(uploads)} files, {sum(each.size for each in uploads) / 1e6:,.1f} MB"
    if given.dry_run:
        return f"{given.repo}: {total} would be uploaded (dry_run)"
    if constants.HF_HUB_OFFLINE:
        raise InputError("HF_HUB_OFFLINE is set, so nothing is uploaded: unset it, or see with dry_run=true what would be")
    if get_token() is None:
        raise InputError("no token of the hub is set: hf auth login, or set HF_TOKEN; dry_run=true needs none")
    return f"{upload(uploads, given.repo, given.private, given.revision)}: {total}"
