"""Documents -> tokens -> packed batches. Depends on no other part of the repository."""
