"""A stand-in for the Hub's API that notes what would be uploaded."""

from types import SimpleNamespace


def record_uploads(monkeypatch):
    """The list of calls: (repository, options) when one is made, (repository, message, file names) for an upload."""
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
            assert "*.safetensors" in delete_patterns
            calls.append((repo_id, commit_message, {path.name for path in folder_path.iterdir()}))

    monkeypatch.setattr("mqa_hf.base.hub.HfApi", Api)
    return calls
