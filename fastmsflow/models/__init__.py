"""The models: MultiScaleFlow (features to latents) and MSFlow (images to scores), and how they are saved."""
