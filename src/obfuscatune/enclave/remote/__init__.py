"""LoRA on the worker, as the paper has it: factors, gradients, dropout and optimizer state, in the transformed basis.

find         a PEFT model         -> which layers of which crossing have an adapter, and its settings
basis        A, B, their moments  -> A* = R_in⁻¹ A, B* = B R_out, and back
adapter      one crossing's       -> attached, put, fetched back into PEFT's own parameters
crossing     x                    -> y with the adapter's part, and the gradients' way back
optimizer    step, clip, zero     -> one message each
adapters     all of a model's     -> moved there; saved and loaded through PEFT as if they were here
"""
