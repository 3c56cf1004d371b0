"""Continued pretraining of a converted (or native) model under an activation schedule.

    accelerate launch recipes/continued_pretrain.py --config recipes/smollm2-135m/continued_pretrain.yaml \
        [--dataset my.parquet --learning_rate 5e-4 ...]

Every key of the YAML file can be overridden on the command line. Started again with the same command, it resumes.
"""

from stocha_hf.training.run import main

if __name__ == "__main__":
    main("continued_pretrain.py")
