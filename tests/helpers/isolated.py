"""Programs in a process that has transformers but cannot import this package, and nobody to answer questions."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BLOCKED = """
import sys
assert "mqa_hf" not in sys.modules
try:
    import mqa_hf
except ImportError:
    pass
else:
    raise SystemExit("mqa_hf is importable; this test proves nothing")
"""


def run_without_the_package(program: str, *arguments: Any, scratch: Path) -> Any:
    """Run a program, `arguments` as JSON in `sys.argv[1]`; what it prints last is read as JSON."""
    blocker = scratch / "blocker"
    (blocker / "mqa_hf").mkdir(parents=True, exist_ok=True)
    (blocker / "mqa_hf" / "__init__.py").write_text("raise ImportError('blocked')")
    result = subprocess.run(
        [sys.executable, "-c", BLOCKED + program, json.dumps(arguments, default=str)],
        env={"PYTHONPATH": str(blocker), "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "home"), "PATH": "/usr/bin"},
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])
