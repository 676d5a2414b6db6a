"""An adapter folder on a model hub, as transformers puts its own there."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from bayeslora.posterior import Posterior
from bayeslora.storage.card import write_card
from bayeslora.storage.checkpoint import write_adapter
from bayeslora.storage.manifest import CARD


def push_to_hub(
    bayes: Posterior,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload what ``save_pretrained`` writes; a card that somebody edited on the hub stays.

    Args:
        bayes: The posterior.
        repo_id: The repository, such as ``"somebody/an-adapter"``; it is made where there is none.
        commit_message, commit_description: Of the commit.
        private: Whether a repository that is made is private.
        token: As in ``huggingface_hub``.
        revision: The branch.
        create_pr: Propose the commit instead of making it.

    Returns:
        The commit's address.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as scratch:
        folder, there = Path(scratch) / "adapter", Path(scratch) / "there"
        folder.mkdir()
        there.mkdir()
        try:
            card = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
            (there / CARD).write_bytes(card.read_bytes())
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            pass
        write_adapter(bayes, folder)
        write_card(bayes, folder, there)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload the adapter and its posterior",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return str(done)
