"""TRUSTED. Holds the secrets, the text and the small parameters; everything large goes to a worker.

How a model comes under protection:

    profiles       a name and changes    -> what is done to which layers
    loading        a directory           -> `config`, `keywords`; the model without weights
    target_layers  the model             -> groups of layers that share an input; `weight_reads`, what is refused
    weights        a group               -> its W, from the files that `checkpoint` finds
    obfuscation    W, a key of `keys`    -> W_star and its transforms; `tiles`, in W's own place
    protection     W_star                -> on the worker; `layers` and `experts` in the plain ones' place
    protect        a model in memory     -> the same; W_star is kept in `spill_store` for a worker that loses it

How a call passes through, and back:

    layers         x of the first layer of a group  -> one request for all; `placeholder_tensors` meanwhile
    autograd       x (..., p)                       -> rows (n, p), outside autocast
    product        rows                             -> rotated, mixed by `mixing` and `kernels`, sent, verified
    masks          rows, under profile `guarded`    -> under a one-time mask; `accountant` counts what it can show
    client         mixed rows                       -> their product by W_star

Beside these: `plan` counts what would run where, `published` warns of a public base, `protected_model` has a protected
one's methods, `remote_lora` trains adapters on the worker, `training_hooks` watches a model under training, `observer`
is told what passes, and `local_worker` starts a worker on this machine.
"""
