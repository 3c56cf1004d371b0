"""Continued pretraining of a converted (or native) model under an activation schedule: stocha-train, as a script.

    accelerate launch recipes/continued_pretrain.py --config recipes/smollm2-135m/continued_pretrain.yaml \
        [--dataset my.parquet --learning_rate 5e-4 ...]
"""

from stocha_hf.cli.train import main

if __name__ == "__main__":
    main("continued_pretrain.py")
