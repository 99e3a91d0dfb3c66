"""How the blocks of a quantised linear layer on Hopper share its tiles, and the steps of each along K.

A block computes one tile; or there are as many blocks as run at once, which compute tiles in turn; or, where waves of whole tiles
would leave some of them idle, each has an equal share of the steps of all tiles, one after the other (stream-k: M. Osama et al.,
arXiv 2301.03598). Then shares are at least as long as a tile, so that no more than two blocks meet in one.
"""

from __future__ import annotations

import tilus
from tilus.kernels.warpgroup_plan import WarpgroupPlan
from tilus.kernels.warpgroup_sums import by_thread, from_thread

BAND = 16  # rows of tiles that take turns, so that what they read again is found in the L2 cache


class Tiles:
    """What a block computes: parts of tiles, numbered from 0 on.

    A cluster has `sharing` rows of tiles by `blocks` parts of K. own, part: this block's. group: the first of the blocks that
    share its activations. count: how many parts of tiles there are.
    """

    def __init__(self, plan: WarpgroupPlan, row_tiles, tokens, steps, launched):
        """tokens: how many there are, and how many tiles of them."""
        count, token_tiles = tokens
        self.plan, self.steps = plan, steps
        self.last = max(count - plan.tokens, 0) if plan.overlaps else None
        self.row_tiles, self.token_tiles = row_tiles, token_tiles
        cluster = plan.blocks * plan.sharing
        rank = tilus.block_id(0) % cluster
        self.own = rank % plan.sharing if plan.sharing > 1 else 0
        self.part = rank // plan.sharing if plan.blocks > 1 else 0
        self.group = self.part * plan.sharing
        self.team, teams = tilus.block_id(0) // cluster, launched // cluster
        if plan.streamed:
            units = row_tiles * token_tiles * steps
            self.begin, self.end = units * self.team // teams, units * (self.team + 1) // teams
            self.first, self.stride = self.begin // steps, 1
            self.count = tilus.cdiv(self.end, steps) - self.first
        elif plan.launched:
            self.first, self.stride = self.team, teams
            self.count = tilus.cdiv(row_tiles * token_tiles - self.team, teams)
        else:
            self.count = 1

    def numbers(self):
        """Of the parts."""
        return tilus.range(self.count) if self.plan.launched else range(1)

    def start(self, index):
        """The first row of tiles and the first token. Of tiles in turn: bands of rows, in which rows vary fastest."""
        if not self.plan.launched:
            row, column = self.team, tilus.block_id(1)
        else:
            number = self.first + index * self.stride
            row, column = number % self.row_tiles, number // self.row_tiles
            if not self.plan.streamed:
                band = number // (BAND * self.token_tiles)
                height = min(self.row_tiles - band * BAND, BAND)
                within = number - band * BAND * self.token_tiles
                row, column = band * BAND + within % height, within // height
        token = column * self.plan.tokens
        if self.last is not None:
            token = min(token, self.last)
        return (row * self.plan.sharing + self.own) * self.plan.rows, token

    def extent(self, index):
        """The first step and the one behind the last."""
        if self.plan.streamed:
            first = (self.first + index) * self.steps
            return max(self.begin - first, 0), min(self.end - first, self.steps)
        return self.steps * self.part // self.plan.blocks, self.steps * (self.part + 1) // self.plan.blocks

    def before(self, index):
        """How many steps this block has done before."""
        begin, end = self.extent(index)
        if self.plan.streamed:
            return (self.first + index) * self.steps + begin - self.begin
        return index * (end - begin)

    def joined(self, total, partial, tickets, index):
        """The sums of a whole tile, and 1; or this block's, and 0, where another block will add them to its own.

        Two blocks meet in a tile. The one that ends with it comes later than the one that begins with the rest of it, unless it
        is delayed; so it looks for the other's sums before it leaves its own. Two numbers have the same sum in either order.
        """
        begin, end = self.extent(index)
        complete = 1
        if end - begin < self.steps:
            rest = min(begin, 1)  # 1 for the block that has the rest of the tile
            place = self.team + 1 - rest
            complete = 0
            if rest == 0:
                complete = tilus.atomic_add(tickets, [place], 0)
            if complete == 0:
                tilus.store(partial[place], [rest, 0, 0, 0], tilus.reshape(by_thread(total), [1, *shape_of(total)]))
                complete = tilus.atomic_add(tickets, [place], 1)
            if complete == 1:
                other = tilus.load(partial[place], [1 - rest, 0, 0, 0], [1, *shape_of(total)])
                total = total + from_thread(tilus.reshape(other, shape_of(total)), total)
                tilus.atomic_exchange(tickets, [place], 0)
        return total, complete


def shape_of(total):
    """Of what `by_thread` makes of it."""
    rows, tokens = total.shape
    return [tokens // 8, 2 * rows, 4]
