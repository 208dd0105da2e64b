"""Run models on images: sessions, `Predictor`, sources of images, bulk prediction."""
