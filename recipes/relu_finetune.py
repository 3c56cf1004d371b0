"""ReLU fine-tune of a model trained with stochastic activations, full or LoRA: stocha-train with ReLU as its schedule.

    accelerate launch recipes/relu_finetune.py --config recipes/smollm2-135m/relu_finetune.yaml [--use_peft ...]

LoRA needs a base that infers with ReLU already: `stocha-convert STAGE1 STAGE1-relu --activation relu` makes it.
"""

from stocha_hf.cli.train import main

if __name__ == "__main__":
    main("relu_finetune.py", schedule=[{"activation": "relu", "until": 1.0}])
