"""Hard Preference Sampling as a library: it knows no recipe, no stage and no file of the pipeline.

methods, losses         families of losses and their formulas; combinations: what of their settings contradicts
negatives, planning     weights of the negatives (Eq. 9), gamma, draws; what each step trains on
chat, tokens            messages to token ids
shared_prefix           a prompt computed once for all its responses
trainer, reference      training on a plan, and log-probabilities under the reference
"""
