//! Where each byte of a volume lies (RAID-0), as pure arithmetic:
//!
//! ```text
//! volume   | s0 | s1 | s2 | s3 | s4 |     stripe units in turn on the nodes
//! node 0   | s0 | s3 |
//! node 1   | s1 | s4 |                    the last may be partial
//! node 2   | s2 |
//! ```
//! On one node the stripes of a volume range follow each other without a gap, so any range of the volume is one range of
//! each node ([`Layout::on_node`]), and offsets of a node map back in order ([`Layout::volume_offset`]).

use std::ops::Range;

/// Stripe unit and number of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    shift: u32,
    nodes: u64,
}

/// A piece of a volume range that lies on one node in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which node, from 0.
    pub node: usize,
    /// Where on the node.
    pub node_offset: u64,
    /// Bytes.
    pub len: usize,
    /// Where in the range's buffer.
    pub position: usize,
}

impl Layout {
    /// The layout with this stripe unit in bytes, rounded up to a power of two, and this number of nodes, at least one.
    pub fn new(stripe: u64, nodes: usize) -> Self {
        // One node has no stripes: with one as long as can be, every range is one extent.
        let shift = if nodes <= 1 { 63 } else { stripe.next_power_of_two().trailing_zeros() };
        Self { shift, nodes: nodes.max(1) as u64 }
    }

    const fn mask(&self) -> u64 {
        (1 << self.shift) - 1
    }

    /// Node and node offset of one byte of the volume.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the node's number is below the number of nodes, a usize")]
    pub const fn locate(&self, offset: u64) -> (usize, u64) {
        let stripe = offset >> self.shift;
        let node_offset = ((stripe / self.nodes) << self.shift) | (offset & self.mask());
        ((stripe % self.nodes) as usize, node_offset)
    }

    /// Node and node offset of a range inside one stripe; `None` when it crosses into another.
    #[inline]
    pub const fn single(&self, offset: u64, len: usize) -> Option<(usize, u64)> {
        // Not an overflow: both are at most the stripe unit.
        if len as u64 <= self.mask() + 1 && (offset & self.mask()) + len as u64 <= self.mask() + 1 {
            Some(self.locate(offset))
        } else {
            None
        }
    }

    /// The extents of a range, in its order.
    pub fn extents(&self, offset: u64, len: usize) -> impl Iterator<Item = Extent> + use<> {
        let layout = *self;
        let mut position = 0;
        std::iter::from_fn(move || {
            let at = offset + position as u64;
            let in_stripe = usize::try_from(layout.mask() + 1 - (at & layout.mask())).expect("a stripe lies in memory");
            let part = in_stripe.min(len - position);
            let (node, node_offset) = layout.locate(at);
            let extent = Extent { node, node_offset, len: part, position };
            position += part;
            (part > 0).then_some(extent)
        })
    }

    /// Bytes that a node holds of the first `volume_len` bytes of the volume: the length of the node for the volume's
    /// size, and the node offset of the first byte at or after a volume offset.
    pub const fn node_len(&self, node: usize, volume_len: u64) -> u64 {
        let stripes = volume_len >> self.shift;
        let (rows, rest) = (stripes / self.nodes, stripes % self.nodes);
        let node = node as u64;
        if node < rest {
            (rows + 1) << self.shift
        } else if node == rest {
            (rows << self.shift) | (volume_len & self.mask())
        } else {
            rows << self.shift
        }
    }

    /// The one range of a node that holds its part of a volume range; may be empty.
    pub const fn on_node(&self, node: usize, offset: u64, len: u64) -> Range<u64> {
        self.node_len(node, offset)..self.node_len(node, offset + len)
    }

    /// Volume offset of a byte of a node.
    pub const fn volume_offset(&self, node: usize, node_offset: u64) -> u64 {
        let stripe = (node_offset >> self.shift) * self.nodes + node as u64;
        (stripe << self.shift) | (node_offset & self.mask())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A layout, a range, and a volume size that holds it.
    fn any_range() -> impl Strategy<Value = (Layout, usize, u64, usize)> {
        (0u32..8, 1usize..9, 0u64..4096, 0usize..2048)
            .prop_map(|(shift, nodes, offset, len)| (Layout::new(1 << shift, nodes), nodes, offset, len))
    }

    proptest! {
        #[test]
        fn extents_cover_the_range_once_and_in_order((layout, nodes, offset, len) in any_range()) {
            let mut position = 0;
            for extent in layout.extents(offset, len) {
                prop_assert!(extent.len > 0 && extent.node < nodes);
                prop_assert_eq!(extent.position, position);
                for i in 0..extent.len {
                    let place = (extent.node, extent.node_offset + i as u64);
                    prop_assert_eq!(layout.locate(offset + (position + i) as u64), place);
                }
                position += extent.len;
            }
            prop_assert_eq!(position, len);
            let extents: Vec<_> = layout.extents(offset, len).collect();
            if len > 0 {
                let single = match extents[..] { [e] => Some((e.node, e.node_offset)), _ => None };
                prop_assert_eq!(layout.single(offset, len), single);
            }
        }

        #[test]
        fn every_byte_has_one_place_and_the_place_maps_back((layout, nodes, offset, _len) in any_range()) {
            let (node, node_offset) = layout.locate(offset);
            prop_assert!(node < nodes);
            prop_assert_eq!(layout.volume_offset(node, node_offset), offset);
        }

        #[test]
        fn node_lengths_add_up_to_the_volume((layout, nodes, size, _len) in any_range()) {
            prop_assert_eq!((0..nodes).map(|n| layout.node_len(n, size)).sum::<u64>(), size);
        }

        /// What lies before a volume offset on a node is a prefix of the node, and its length is where the rest begins.
        #[test]
        fn a_range_of_the_volume_is_one_range_of_each_node((layout, nodes, offset, len) in any_range()) {
            for node in 0..nodes {
                let range = layout.on_node(node, offset, len as u64);
                let mut expected: Vec<_> = (offset..offset + len as u64)
                    .map(|at| layout.locate(at))
                    .filter_map(|(n, at)| (n == node).then_some(at))
                    .collect();
                expected.sort_unstable();
                prop_assert_eq!(range.collect::<Vec<_>>(), expected);
            }
        }
    }

    #[test]
    fn the_largest_volume_does_not_overflow() {
        let size = everdisk_proto::limits::VOLUME_SIZE_MAX;
        for (stripe, nodes) in [(64 << 10, 1), (64 << 10, 64), (1 << 30, 63)] {
            let layout = Layout::new(stripe, nodes);
            assert_eq!((0..nodes).map(|n| layout.node_len(n, size)).sum::<u64>(), size);
            let (node, at) = layout.locate(size - 1);
            assert_eq!(layout.volume_offset(node, at), size - 1);
            assert!(layout.node_len(node, size) > at);
            assert_eq!(layout.extents(size - 4096, 4096).map(|e| e.len).sum::<usize>(), 4096);
        }
    }
}
