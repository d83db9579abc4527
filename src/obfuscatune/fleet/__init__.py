"""TRUSTED. Who belongs to a fleet of workers, whom to trust with it, and who holds what.

In the order in which a fleet comes about:

    fleet_file fleet.yaml -> members, policy, placement
    members    a worker, its certificate, its operator and party
    listing    a list of them that came over a network -> members, or an error
    discovery  the list, fetched again and again, held against the policy
    policy     whom to accept: a policy on operators' keys
    placement  which worker holds which columns of which matrix: a pure function
"""
