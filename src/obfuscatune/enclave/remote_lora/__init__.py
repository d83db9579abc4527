"""LoRA on the worker, as the paper has it: factors, gradients, dropout and optimizer state, in the transformed basis.

adapter      a PEFT model         -> which layers have an adapter; A* = R_in⁻¹ A, B* = B R_out, put and fetched back
layers       x                    -> y with the adapter's part, and the gradients' way back
optimizer    step, clip, zero     -> one message each
adapters     all of a model's     -> moved there; saved and loaded through PEFT as if they were here
"""
