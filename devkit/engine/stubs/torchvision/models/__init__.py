def efficientnet_v2_s(*args, **kwargs):
    raise NotImplementedError("torchvision is a stand-in here: Stable Cascade's encoder is not available")
