"""Hard Preference Sampling as a library: independent of recipes, stages and files.

methods, losses         families of losses and their formulas
settings, combinations  settings of the method, and those that contradict each other
records                 types of ranked records and of the plan's rows
negatives, planning     weights of the negatives (Eq. 9), gamma, draws, and what each step trains on
chat, tokens            messages to token ids
shared_prefix           a prompt computed once for all its responses
trainer, reference      training on a plan, and log-probabilities under the reference
"""
