//! A picture of latency over time: one column for each slice of time, as high as its longest I/O on a logarithmic axis.

use crate::load::Io;

const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const EIGHTHS: u32 = 8;
/// Rows for each factor of ten.
const ROWS: u32 = 3;
/// Columns before the axis.
const MARGIN: usize = 8;

/// An event under the picture.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// CLOCK_MONOTONIC ns.
    pub at_ns: u64,
    /// Its letter.
    pub letter: char,
}

/// Longest latency of each of `columns` equal slices of `from_ns..to_ns`; an I/O counts where it ended. None: no I/O.
pub fn longest(log: &[Io], from_ns: u64, to_ns: u64, columns: usize) -> Vec<Option<u64>> {
    let mut slices = vec![None; columns];
    for io in log {
        if let Some(slice) = column(io.end_ns, from_ns, to_ns, columns).and_then(|c| slices.get_mut(c)) {
            *slice = Some(io.latency_ns.max(slice.unwrap_or(0)));
        }
    }
    slices
}

fn column(at_ns: u64, from_ns: u64, to_ns: u64, columns: usize) -> Option<usize> {
    let since = at_ns.checked_sub(from_ns)?;
    let whole = to_ns.checked_sub(from_ns).filter(|whole| *whole > 0)?;
    usize::try_from(u128::from(since) * columns as u128 / u128::from(whole)).ok().filter(|c| *c < columns)
}

/// Draws the picture, `width` characters wide.
pub fn draw(log: &[Io], from_ns: u64, to_ns: u64, marks: &[Mark], width: usize) -> Vec<String> {
    let columns = width.saturating_sub(MARGIN + 2).max(10);
    let slices = longest(log, from_ns, to_ns, columns);
    let values = || slices.iter().flatten().copied();
    let (mut low, mut decades) = (1_000, 1);
    while low * 10 <= values().min().unwrap_or(0) {
        low *= 10;
    }
    while low * 10_u64.pow(decades) < values().max().unwrap_or(0) && decades < 9 {
        decades += 1;
    }
    let rows = decades * ROWS;
    let heights: Vec<u32> = slices.iter().map(|slice| slice.map_or(0, |ns| height(ns, low, rows))).collect();
    let top = heights.iter().max().map_or(1, |height| height.div_ceil(EIGHTHS));
    let mut lines: Vec<String> = (0..top)
        .rev()
        .map(|row| {
            let label = if row % ROWS == 0 { power(low * 10_u64.pow(row / ROWS)) } else { String::new() };
            let bars = heights.iter().map(|height| bar(*height, row)).collect::<String>();
            format!("{label:>MARGIN$} ┤{}", bars.trim_end())
        })
        .collect();
    lines.push(format!("{:MARGIN$} └{}", "", "─".repeat(columns)));
    lines.push(format!("{:MARGIN$}  {}", "", letters(marks, from_ns, to_ns, columns).trim_end()));
    let seconds = format!("{:.0} s", (to_ns - from_ns) as f64 / 1e9);
    lines.push(format!("{:MARGIN$}  0 s{seconds:>rest$}", "", rest = columns - 3));
    lines
}

/// A power of ten of nanoseconds in words.
fn power(ns: u64) -> String {
    match ns {
        ..1_000_000 => format!("{} µs", ns / 1_000),
        1_000_000..1_000_000_000 => format!("{} ms", ns / 1_000_000),
        _ => format!("{} s", ns / 1_000_000_000),
    }
}

/// Eighths of a row; an I/O shows, however short.
fn height(ns: u64, low: u64, rows: u32) -> u32 {
    let step = |eighths: u32| low as f64 * 10_f64.powf(f64::from(eighths) / f64::from(ROWS * EIGHTHS));
    (1..=rows * EIGHTHS).take_while(|&eighths| step(eighths) <= ns as f64).last().unwrap_or(1)
}

fn bar(height: u32, row: u32) -> char {
    let eighths = height.saturating_sub(row * EIGHTHS).min(EIGHTHS);
    BARS.get(usize::try_from(eighths).unwrap_or(0)).copied().unwrap_or(' ')
}

/// The line of events; one that has no room takes the next free column.
fn letters(marks: &[Mark], from_ns: u64, to_ns: u64, columns: usize) -> String {
    let mut line = vec![' '; columns];
    for mark in marks {
        let at = column(mark.at_ns, from_ns, to_ns, columns);
        if let Some(free) = at.and_then(|at| line.iter_mut().skip(at).find(|c| **c == ' ')) {
            *free = mark.letter;
        }
    }
    line.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_stands_above_its_mark_and_a_gap_is_empty() {
        let io = |ms: u64, latency_ns| Io { end_ns: ms * 1_000_000, latency_ns };
        let mut log: Vec<Io> = (0..50).chain(60..100).map(|ms| io(ms, 100_000)).collect();
        log.push(io(30, 90_000_000));
        let marks = [Mark { at_ns: 30_000_000, letter: 'K' }, Mark { at_ns: 30_100_000, letter: 'U' }];
        let lines = draw(&log, 0, 100_000_000, &marks, 110);
        let at = |line: &String, c: usize| line.chars().nth(c);
        let first = MARGIN + 2;
        assert_eq!(lines.len(), 3 * 3 + 3);
        assert_eq!(at(&lines[0], first + 30), Some('▆'));
        assert_eq!(at(&lines[0], first + 31), None);
        assert_eq!(at(&lines[8], first + 10), Some('▁'));
        assert_eq!(at(&lines[8], first + 55), Some(' '));
        assert!(lines[8].starts_with("  100 µs ┤"), "{}", lines[8]);
        assert_eq!(lines[10].trim(), "KU");
        assert_eq!(at(&lines[10], first + 30), Some('K'));
        assert!(lines[11].trim_start().starts_with("0 s") && lines[11].ends_with('s'));
    }
}
