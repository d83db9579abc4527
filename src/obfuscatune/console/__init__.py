"""A console in the browser, for the three roles. Pages come from the machine of whoever looks at them.

    sessions    one-time link -> session
    guard       what every request passes first, what every answer carries
    pages       templates, texts of messages/, numbers and times for people
    shell       link, pages, static files -> one application, served on one socket
    assessment  a verification -> what each check shows, and no more than that
    records     a JSON Lines file -> which lines cannot be used, and why
    connection  the owner's verified service, kept verified; the provider's attested sessions
    owner_*     the owner's pages
    provider    the provider's pages; releases: what he released, where, on what evidence
    operator    the operator's page, of numbers that the service hands in

Owner's and provider's pages are drawn from what their own machine verified. No torch.
"""
