"""mqa-hf: convert pretrained multi-head checkpoints to multi-query attention in Hugging Face transformers.

    from mqa_hf import convert

    convert("HuggingFaceTB/SmolLM2-135M-Instruct", "converted", method="shared")

Importing this package registers its classes with transformers' Auto classes. A converted checkpoint also carries the
files that it needs and loads without the package with `trust_remote_code=True`. PyTorch and transformers are imported
only when they are needed.
"""

from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from .base.registration import when_imported

if TYPE_CHECKING:
    from .base.errors import ConversionError, ConversionWarning, MQAError
    from .configuration_mqa import MQAConfig
    from .configuration_mqa_seq2seq import MQASeq2SeqConfig
    from .conversion.convert import convert
    from .conversion.inspect import inspect
    from .eval.benchmark import benchmark
    from .eval.evaluate import evaluate
    from .eval.plan import plan
    from .eval.report import report
    from .finetune.pretrain import pretrain
    from .finetune.uptrain import uptrain
    from .modeling_mqa import (
        MQAForCausalLM,
        MQAForQuestionAnswering,
        MQAForSequenceClassification,
        MQAForTokenClassification,
        MQAModel,
        MQAPreTrainedModel,
    )
    from .modeling_mqa_seq2seq import MQAForConditionalGeneration, MQASeq2SeqModel
    from .modeling_mqa_speech import MQAForSpeechSeq2Seq

__all__ = [
    "ConversionError",
    "ConversionWarning",
    "MQAConfig",
    "MQAError",
    "MQAForCausalLM",
    "MQAForConditionalGeneration",
    "MQAForQuestionAnswering",
    "MQAForSequenceClassification",
    "MQAForSpeechSeq2Seq",
    "MQAForTokenClassification",
    "MQAModel",
    "MQAPreTrainedModel",
    "MQASeq2SeqConfig",
    "MQASeq2SeqModel",
    "__version__",
    "benchmark",
    "convert",
    "evaluate",
    "inspect",
    "plan",
    "pretrain",
    "report",
    "uptrain",
]

__version__ = version("mqa-hf")

# The module of each name, which is imported on first access.
_LIGHT = {
    "base.errors": ("ConversionError", "ConversionWarning", "MQAError"),
    "conversion.convert": ("convert",),
    "conversion.inspect": ("inspect",),
    "eval.benchmark": ("benchmark",),
    "eval.evaluate": ("evaluate",),
    "eval.plan": ("plan",),
    "eval.report": ("report",),
    "finetune.pretrain": ("pretrain",),
    "finetune.uptrain": ("uptrain",),
}
_CLASSES = {
    "configuration_mqa": ("MQAConfig",),
    "configuration_mqa_seq2seq": ("MQASeq2SeqConfig",),
    "modeling_mqa": (
        "MQAForCausalLM",
        "MQAForQuestionAnswering",
        "MQAForSequenceClassification",
        "MQAForTokenClassification",
        "MQAModel",
        "MQAPreTrainedModel",
    ),
    "modeling_mqa_seq2seq": ("MQAForConditionalGeneration", "MQASeq2SeqModel"),
    "modeling_mqa_speech": ("MQAForSpeechSeq2Seq",),
}
_HOME = {name: module for modules in (_LIGHT, _CLASSES) for module, names in modules.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] in _CLASSES:
        _register_configs()
        _register_models()
    globals()[name] = found = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def _register_configs() -> None:
    from transformers import AutoConfig

    from .configuration_mqa import MQAConfig
    from .configuration_mqa_seq2seq import MQASeq2SeqConfig

    for config in (MQAConfig, MQASeq2SeqConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        config.register_for_auto_class()  # `save_pretrained` then copies these files


def _register_models() -> None:
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForSpeechSeq2Seq,
        AutoModelForTokenClassification,
    )

    from .modeling_mqa import (
        MQAForCausalLM,
        MQAForQuestionAnswering,
        MQAForSequenceClassification,
        MQAForTokenClassification,
        MQAModel,
    )
    from .modeling_mqa_seq2seq import MQAForConditionalGeneration, MQASeq2SeqModel
    from .modeling_mqa_speech import MQAForSpeechSeq2Seq

    for auto, model in (
        (AutoModel, MQAModel),
        (AutoModelForCausalLM, MQAForCausalLM),
        (AutoModelForSequenceClassification, MQAForSequenceClassification),
        (AutoModelForTokenClassification, MQAForTokenClassification),
        (AutoModelForQuestionAnswering, MQAForQuestionAnswering),
        (AutoModel, MQASeq2SeqModel),
        (AutoModelForSeq2SeqLM, MQAForConditionalGeneration),
        (AutoModelForSpeechSeq2Seq, MQAForSpeechSeq2Seq),
    ):
        auto.register(model.config_class, model, exist_ok=True)
        model.register_for_auto_class(auto.__name__)


def _register_lazily() -> None:
    """Register configurations now, and models when the first configuration is created.

    Our models need modules that import the module of transformers' Auto model classes, so registering them on its
    import would be too early. A configuration is always created before its model is loaded.
    """
    from .configuration_mqa import MQAConfig
    from .configuration_mqa_seq2seq import MQASeq2SeqConfig

    _register_configs()
    made = {config: config.__post_init__ for config in (MQAConfig, MQASeq2SeqConfig)}

    def first(self: Any, **kwargs: Any) -> None:
        for config, post_init in made.items():
            config.__post_init__ = post_init  # type: ignore[method-assign]
        _register_models()
        self.__post_init__(**kwargs)

    for config in made:
        config.__post_init__ = first  # type: ignore[method-assign]


def _register_early() -> None:
    """Register models when the Auto classes are imported, for configurations created earlier or unpickled."""
    with suppress(ImportError):  # if a module that our models need is importing them; see above
        _register_models()


when_imported("transformers.models.auto.configuration_auto", _register_lazily)
when_imported("transformers.models.auto.modeling_auto", _register_early)
