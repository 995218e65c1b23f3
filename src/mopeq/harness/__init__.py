"""Other people's evaluations driven by mopeq's models. Each file needs its own package, installed only where wanted.

lm_eval.py      lm-evaluation-harness: `mopeq eval --lm-eval TASK`, and a model class for the harness's own use
vlmevalkit.py   VLMEvalKit: a model class that its inference loop drives; the kit itself is not imported
"""
