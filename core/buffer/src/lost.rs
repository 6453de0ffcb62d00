//! Ranges of the volume whose acknowledged data is lost: buffered data that was found damaged, and data written past
//! the buffer before a flush failed. They are like unreadable sectors of a disk: reading one is an error until it is
//! written anew. The list is in the buffer's header, so that every core knows it.

use alloc::vec::Vec;
use core::{
    ops::Range,
    sync::atomic::Ordering::{Acquire, Relaxed, Release},
};

use everdisk_proto::buffer::{LOST_MAX, lost_count, word};

use crate::area::Area;

/// The list, in order and without overlaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lost(Vec<Range<u64>>);

impl Lost {
    /// Reads the list.
    pub fn load(area: &impl Area) -> Self {
        let state = area.load(word::LOST, Acquire);
        // Another core wrote the count. An impossible one is taken as the largest the table has room for.
        let count = usize::try_from(lost_count(state)).unwrap_or(LOST_MAX).min(LOST_MAX);
        let range = |entry| {
            let at = table(state >> 32) + 2 * entry;
            let (start, len) = (area.load(at, Relaxed), area.load(at + 1, Relaxed));
            start..start.saturating_add(len)
        };
        let mut lost = Self((0..count).map(range).filter(|range| !range.is_empty()).collect());
        lost.normalise();
        lost
    }

    /// Writes the list into the table that is not in use. Then one store makes that the table in use.
    pub fn save(&self, area: &impl Area) {
        let next = 1 - ((area.load(word::LOST, Relaxed) >> 32) & 1);
        for (entry, range) in self.0.iter().enumerate() {
            let at = table(next) + 2 * entry;
            area.store(at, range.start, Relaxed);
            area.store(at + 1, range.end - range.start, Relaxed);
        }
        area.store(word::LOST, (next << 32) | self.0.len() as u64, Release);
    }

    /// Whether nothing is lost.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.0
    }

    /// Whether anything of a range is lost.
    pub fn overlaps(&self, range: &Range<u64>) -> bool {
        range.start < range.end && self.0.iter().any(|lost| lost.start < range.end && range.start < lost.end)
    }

    /// Adds a range.
    pub fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        self.0.push(range);
        self.normalise();
    }

    /// Adds several ranges.
    pub fn add_all(&mut self, ranges: impl IntoIterator<Item = Range<u64>>) {
        self.0.extend(ranges.into_iter().filter(|range| !range.is_empty()));
        self.normalise();
    }

    /// Restores the order, without overlaps and within the capacity.
    fn normalise(&mut self) {
        self.0.sort_unstable_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::with_capacity(self.0.len());
        for range in self.0.drain(..) {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        self.0 = merged;
        self.bound();
    }

    /// Keeps the list within its capacity by joining the ranges that lie closest.
    fn bound(&mut self) {
        let Some(surplus) = self.0.len().checked_sub(LOST_MAX).filter(|surplus| *surplus > 0) else { return };
        let mut gaps: Vec<(u64, usize)> =
            self.0.windows(2).enumerate().map(|(index, pair)| (pair[1].start - pair[0].end, index + 1)).collect();
        gaps.sort_unstable();
        let mut joined: Vec<usize> = gaps.into_iter().take(surplus).map(|(_, index)| index).collect();
        joined.sort_unstable();
        for index in joined.into_iter().rev() {
            let second = self.0.remove(index);
            self.0[index - 1].end = second.end;
        }
    }

    /// Whether a range can be written anew. It cannot where it would cut a lost range in two and there is no room for
    /// another: what was written anew would have to count as lost again.
    pub fn has_room_to_cut(&self, range: &Range<u64>) -> bool {
        self.0.len() < LOST_MAX || !self.0.iter().any(|lost| lost.start < range.start && range.end < lost.end)
    }

    /// A range was written anew. Returns whether that changed anything: not where [`Lost::has_room_to_cut`] is false.
    pub fn remove(&mut self, range: &Range<u64>) -> bool {
        if !self.overlaps(range) || !self.has_room_to_cut(range) {
            return false;
        }
        let parts =
            self.0.iter().flat_map(|lost| [lost.start..lost.end.min(range.start), lost.start.max(range.end)..lost.end]);
        self.0 = parts.filter(|part| part.start < part.end).collect();
        true
    }
}

/// First word of one of the two tables.
const fn table(which: u64) -> usize {
    word::LOST_RANGES + if which & 1 == 0 { 0 } else { 2 * LOST_MAX }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::testing::MortalArea;

    #[test]
    fn ranges_are_joined_cut_and_kept() {
        let area = MortalArea::new(2 << 20);
        let mut lost = Lost::default();
        lost.add(100..200);
        lost.add(300..400);
        lost.add(150..310);
        assert_eq!(lost.ranges(), std::slice::from_ref(&(100..400)));
        assert!(lost.remove(&(200..300)) && !lost.remove(&(200..300)));
        assert_eq!(lost.ranges(), [100..200, 300..400]);
        assert!(lost.overlaps(&(199..201)) && !lost.overlaps(&(200..300)) && !lost.overlaps(&(150..150)));
        lost.save(&area);
        assert_eq!(Lost::load(&area), lost);
    }

    #[test]
    fn too_many_ranges_are_covered_by_fewer() {
        let count = 2 * LOST_MAX as u64;
        let mut lost = Lost::default();
        for n in 0..count {
            lost.add(n * 10..n * 10 + 1);
        }
        assert_eq!(lost.ranges().len(), LOST_MAX);
        assert!((0..count).all(|n| lost.overlaps(&(n * 10..n * 10 + 1))));
        let mut at_once = Lost::default();
        at_once.add_all((0..count).map(|n| n * 10..n * 10 + 1));
        assert_eq!(at_once.ranges().len(), LOST_MAX);
        assert!((0..count).all(|n| at_once.overlaps(&(n * 10..n * 10 + 1))));
    }

    /// semantics 12: "until the range is written anew", whatever the number of lost ranges.
    #[test]
    fn what_was_written_anew_is_not_lost_again() {
        let mut lost = Lost::default();
        lost.add_all((0..LOST_MAX as u64 - 1).map(|n| n * 100_000..n * 100_000 + 12_288));
        assert!(lost.has_room_to_cut(&(4096..8192)) && lost.remove(&(4096..8192)), "written anew");
        assert!(!lost.overlaps(&(4096..8192)), "and lost again: the next core takes it out of its index");
        let middle = 104_096..108_192;
        assert!(!lost.has_room_to_cut(&middle), "there is no room for two where there was one");
        assert!(!lost.remove(&middle) && lost.overlaps(&middle), "it stays lost");
        assert!(lost.has_room_to_cut(&(100_000..104_096)) && lost.remove(&(100_000..104_096)), "but for a part of it");
        assert!(lost.remove(&(200_000..212_288)) && lost.has_room_to_cut(&middle) && lost.remove(&middle));
    }

    /// A core dies at any point of the save: the list is the old one or the new one.
    #[test]
    fn a_death_leaves_the_old_list_or_the_new_one() {
        let (mut old, mut new) = (Lost::default(), Lost::default());
        old.add(0..10);
        old.add(50..60);
        new.add(5..10);
        new.add(20..30);
        new.add(50..60);
        for stores in 0..10 {
            let area = MortalArea::new(2 << 20);
            old.save(&area);
            area.die_after(stores);
            new.save(&area);
            area.revive();
            let found = Lost::load(&area);
            assert!(found == old || found == new, "{found:?}");
        }
    }
}
