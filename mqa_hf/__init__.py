"""mqa-hf: pretrained multi-head checkpoints as multi-query ones, in Hugging Face transformers.

Importing this package registers the model with transformers' Auto classes; a converted checkpoint also carries the
files it needs and loads without the package by `trust_remote_code=True`.
"""

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mqa import MQAConfig
from .modeling_mqa import MQAForCausalLM, MQAModel, MQAPreTrainedModel

__version__ = version("mqa-hf")

AutoConfig.register(MQAConfig.model_type, MQAConfig, exist_ok=True)
AutoModel.register(MQAConfig, MQAModel, exist_ok=True)
AutoModelForCausalLM.register(MQAConfig, MQAForCausalLM, exist_ok=True)

# So that `save_pretrained` writes these files beside the weights.
MQAConfig.register_for_auto_class()
MQAModel.register_for_auto_class("AutoModel")
MQAForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MQAConfig", "MQAForCausalLM", "MQAModel", "MQAPreTrainedModel", "__version__"]
