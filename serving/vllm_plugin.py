"""Plugin of vLLM: with this package installed, `vllm serve CONVERTED` runs checkpoints of its decoder-only class.

vLLM calls [`register`] in each of its processes (entry point `vllm.general_plugins`). Nothing else imports vLLM.
"""

import logging

TESTED = ("0.24", "0.32")  # versions of vLLM
ARCHITECTURES = {"MQAForCausalLM": "mqa_hf.serving.vllm_model:MQAForVLLM"}

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures the loggers below its name


def register() -> None:
    """Register the cache sizes and the model class with vLLM; importing the package has registered configurations."""
    import vllm

    version = ".".join(vllm.__version__.split(".")[:2])
    if version not in TESTED:
        logger.warning(
            "mqa-hf's plugin is tested with vLLM %s; this is %s. Compare its tokens with those of transformers.",
            ", ".join(TESTED),
            vllm.__version__,
        )
    try:
        from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

        from .vllm_shapes import EncoderDecoderShapes, Shapes
    except ImportError as error:
        logger.warning("mqa-hf's plugin cannot be used with vLLM %s: %s", vllm.__version__, error)
        return
    MODEL_ARCH_CONFIG_CONVERTORS["mqa"] = Shapes
    MODEL_ARCH_CONFIG_CONVERTORS["mqa_seq2seq"] = EncoderDecoderShapes
    for name, where in ARCHITECTURES.items():
        vllm.ModelRegistry.register_model(name, where)
