//! Tables in plain text.

/// Lays rows out in columns; the first row is the heading. Columns listed in `left` are flush left, others right.
pub fn table(rows: &[Vec<String>], left: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |text: &str| text.chars().count();
    let widths: Vec<usize> =
        (0..columns).map(|c| rows.iter().filter_map(|row| row.get(c)).map(|t| width(t)).max().unwrap_or(0)).collect();
    let mut lines = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let cells = widths.iter().enumerate().map(|(c, &wide)| {
            let text = row.get(c).map_or("", String::as_str);
            let pad = " ".repeat(wide - width(text));
            if left.contains(&c) { format!("{text}{pad}") } else { format!("{pad}{text}") }
        });
        lines.push(format!("  {}", cells.collect::<Vec<_>>().join("  ")).trim_end().to_owned());
        if index == 0 {
            let total = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
            lines.push(format!("  {}", "─".repeat(total)));
        }
    }
    lines.join("\n")
}

/// A row of owned cells.
pub fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// "met", or by how much it was missed; `value` must be at most `limit`.
pub fn at_most(value: f64, limit: f64) -> String {
    if value <= limit { "met".to_owned() } else { format!("missed, {:.2} × the limit", value / limit) }
}

/// "met", or by how much it was missed; `value` must be at least `limit`.
pub fn at_least(value: f64, limit: f64) -> String {
    if value >= limit { "met".to_owned() } else { format!("missed by {:.0} %", (1.0 - value / limit) * 100.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![row(["what", "µs"]), row(["a", "12"]), row(["longer", "7"])];
        assert_eq!(table(&rows, &[0]), "  what    µs\n  ──────────\n  a       12\n  longer   7");
        assert_eq!(at_least(3.0, 4.0), "missed by 25 %");
        assert_eq!(at_most(1.0, 1.2), "met");
    }
}
