"""`python -m mqa_hf`, for launchers that start a module: `accelerate launch -m mqa_hf uptrain ...`."""

from mqa_hf.cli import main

if __name__ == "__main__":
    main()
