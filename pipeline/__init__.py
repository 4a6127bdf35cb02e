"""The pipeline around the model: preprocess, train, tune, evaluate, report; Ray and DeepSpeed."""
