"""An interpolated 5-gram model over token ids, the yardstick that the embedded backbone must beat.

Modified Kneser–Ney smoothing (Chen & Goodman 1999, Sec. 3): three discounts an order, estimated from the counts of
counts; the lower orders count distinct left neighbours instead of occurrences; the unigrams are interpolated with the
uniform distribution, so every token has some probability. Counts live in sorted arrays, so memory is about 30 bytes a
token and order, and nothing is built in Python loops.
"""

import numpy as np

ORDER = 5


def _rank(keys, among):
    """Position of each key in the sorted unique array `among`, or -1."""
    at = np.minimum(np.searchsorted(among, keys), len(among) - 1)
    return np.where(among[at] == keys, at, -1)


def _discounts(counts):
    n1, n2, n3, n4 = (max(1, int((counts == k).sum())) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    return np.clip([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0.0, [0, 1, 2, 3])


def nll(train_ids, val_ids, vocab=8192, order=ORDER):
    """Mean negative log-likelihood, in nats a token, of `val_ids` under the model of `train_ids` (1-D integer arrays).

    Contexts reach back over the whole stream; the first `order - 1` tokens of it are not scored.
    """
    train, val = np.asarray(train_ids, np.int64), np.asarray(val_ids, np.int64)
    m, n = len(train), len(val)
    # grams[k]: sorted unique keys of the k+1-grams; a key is (rank of the k-gram that is its context) * vocab + last
    # token. at[k], goal[k]: rank in grams[k] of the k+1-gram that ends at each position of train and of val (-1 where
    # unseen)
    grams, at, goal = [], [], []
    for k in range(order):
        context = np.zeros(m, np.int64) if k == 0 else np.concatenate([[-1], at[k - 1][:-1]])
        seek = np.zeros(n, np.int64) if k == 0 else np.concatenate([[-1], goal[k - 1][:-1]])
        keys = np.where(context < 0, -1, context * vocab + train)
        grams.append(np.unique(keys[keys >= 0]))
        at.append(np.where(keys < 0, -1, np.searchsorted(grams[k], keys)))
        goal.append(np.where(seek < 0, -1, _rank(seek * vocab + val, grams[k])))
    p = np.full(n, 1 / vocab)
    for k in range(order):
        seen = at[k] >= 0
        if k + 1 == order:
            counts = np.bincount(at[k][seen], minlength=len(grams[k]))
        else:  # in how many different words' company: each distinct k+2-gram counts once for the k+1-gram that ends it
            ends = np.zeros(len(grams[k + 1]), np.int64)
            longer = at[k + 1] >= 0
            ends[at[k + 1][longer]] = at[k][longer]
            counts = np.maximum(1, np.bincount(ends, minlength=len(grams[k])))
        discount = _discounts(counts)
        cut = discount[np.minimum(counts, 3)]
        parent = grams[k] // vocab
        size = 1 if k == 0 else len(grams[k - 1])
        total = np.bincount(parent, counts, size)
        spare = np.bincount(parent, cut, size)  # mass taken by the discounts, given to the lower order
        context = np.zeros(n, np.int64) if k == 0 else np.concatenate([[-1], goal[k - 1][:-1]])
        known = (context >= 0) & (total[np.maximum(context, 0)] > 0)
        c = np.maximum(context, 0)
        own = np.where(goal[k] >= 0, (counts - cut)[goal[k]], 0.0)
        p = np.where(known, (own + spare[c] * p) / np.maximum(total[c], 1), p)
    return float(-np.log(p[order - 1 :]).mean())
