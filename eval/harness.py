"""Tasks of lm-eval (EleutherAI's language model evaluation harness) on checkpoints, for `mqa-hf evaluate --tasks`.

The same with lm-eval's command line, without this package:

    lm_eval --model hf --model_args pretrained=CONVERTED,trust_remote_code=True --tasks hellaswag
"""

from pathlib import Path
from typing import Any

from mqa_hf.base.errors import MQAError
from mqa_hf.conversion.loading import load_model


def run_tasks(
    path: Path, tasks: tuple[str, ...], include: Path | None, limit: int | None, dtype: str, device: str
) -> dict[str, Any]:
    """Run tasks, and return their results by task and metric, with standard errors.

    Args:
        path: directory of the checkpoint.
        tasks: names of the tasks.
        include: directory with your own tasks.
        limit: examples per task.
        dtype: type of the weights; "auto" is the checkpoint's.
        device: PyTorch device.

    Raises:
        MQAError: if lm-eval is not installed, or does not have a task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MQAError("`tasks` needs lm-eval: pip install 'mqa-hf[lm-eval]'") from error
    if include is not None and not include.is_dir():
        raise MQAError(f"`include_path` {include} is not a directory")
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise MQAError(f"lm-eval has no task {', '.join(unknown)}; use `include_path` to add a directory of tasks")
    load_model(path, dtype=dtype)  # raises if tensors are missing; lm-eval would load such a checkpoint
    arguments = {"pretrained": str(path), "dtype": dtype}
    found: Any = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        device=device,
        batch_size=8,
    )
    if found is None:  # not the first of several processes
        return {}
    results = {task: {k: v for k, v in numbers.items() if k != "alias"} for task, numbers in found["results"].items()}
    return {"results": results, "versions": found["versions"], "limit": limit}
