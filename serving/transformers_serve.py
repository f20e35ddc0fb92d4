"""`transformers serve` for checkpoints of this package's classes.

    python -m mqa_hf.serving.transformers_serve CONVERTED --port 8000

`transformers serve` looks the class of a checkpoint up in the module `transformers`, by its name. This puts the
classes there, and runs it with the same options.
"""

import sys


def main() -> None:
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app

    from mqa_hf.modeling_mqa import MQAForCausalLM
    from mqa_hf.modeling_mqa_seq2seq import MQAForConditionalGeneration
    from mqa_hf.modeling_mqa_speech import MQAForSpeechSeq2Seq

    # The module that the server holds: transformers executes its `__init__` again while the models are imported, so
    # `sys.modules` may have another by now.
    for model in (MQAForCausalLM, MQAForConditionalGeneration, MQAForSpeechSeq2Seq):
        setattr(model_manager.transformers, model.__name__, model)
    app(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    main()
