"""TRUSTED. Who belongs to a fleet of workers.

members    a worker, its certificate, its operator and party
listing    a list of them that came over a network -> members, or an error
discovery  the list, fetched again and again, held against the policy
"""
