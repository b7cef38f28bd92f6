"""inference-appliance: Clarifai's predict API on your own hardware."""

__version__ = "0.1.0"
