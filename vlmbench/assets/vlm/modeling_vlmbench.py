from vlmbench.models.vlm import VLMConfig, VLMForConditionalGeneration, VLMModel, VLMProcessor  # noqa: F401
