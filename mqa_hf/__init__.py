"""mqa-hf: pretrained multi-head checkpoints as multi-query ones, in Hugging Face transformers.

Importing this package registers the model with transformers' Auto classes; a converted checkpoint also carries the
files it needs and loads without the package by `trust_remote_code=True`.
"""

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from .configuration_mqa import MQAConfig
from .configuration_mqa_seq2seq import MQASeq2SeqConfig
from .modeling_mqa import MQAForCausalLM, MQAModel, MQAPreTrainedModel
from .modeling_mqa_seq2seq import MQAForConditionalGeneration, MQASeq2SeqModel
from .modeling_mqa_speech import MQAForSpeechSeq2Seq

__version__ = version("mqa-hf")

for _config in (MQAConfig, MQASeq2SeqConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _config.register_for_auto_class()  # so that `save_pretrained` writes these files beside the weights
for _auto, _model in (
    (AutoModel, MQAModel),
    (AutoModelForCausalLM, MQAForCausalLM),
    (AutoModel, MQASeq2SeqModel),
    (AutoModelForSeq2SeqLM, MQAForConditionalGeneration),
    (AutoModelForSpeechSeq2Seq, MQAForSpeechSeq2Seq),
):
    _auto.register(_model.config_class, _model, exist_ok=True)
    _model.register_for_auto_class(_auto.__name__)

__all__ = [
    "MQAConfig",
    "MQAForCausalLM",
    "MQAForConditionalGeneration",
    "MQAForSpeechSeq2Seq",
    "MQAModel",
    "MQAPreTrainedModel",
    "MQASeq2SeqConfig",
    "MQASeq2SeqModel",
    "__version__",
]
