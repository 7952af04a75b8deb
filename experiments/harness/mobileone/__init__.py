"""Parts of experiments/mobileone.py: the network, trained on ImageNet by others, and its photographs."""
