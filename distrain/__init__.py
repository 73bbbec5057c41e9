"""distrain trains DenseNet and RegNet image classifiers on many GPU nodes and never loses work."""

__version__ = "0.1.0"
