//! Figures: samples in, a table for people and JSON for programs out.

use comfy_table::Table;
use serde_json::{Map, Value, json};

/// All that was measured in this run.
#[derive(Default)]
pub struct Figures {
    table: Table,
    json: Map<String, Value>,
}

impl Figures {
    /// An empty report.
    pub fn new() -> Figures {
        let mut table = Table::new();
        table.set_header(["what", "n", "p50", "p95", "p99", "max", "unit"]);
        Figures { table, json: Map::new() }
    }

    /// Adds samples in milliseconds; returns their median.
    pub fn samples(&mut self, name: &str, mut ms: Vec<f64>) -> f64 {
        ms.sort_by(f64::total_cmp);
        let at = |q: f64| ms[((ms.len() - 1) as f64 * q).round() as usize];
        let (p50, p95, p99, max) = (at(0.5), at(0.95), at(0.99), at(1.0));
        let cell = |v: f64| if v < 10.0 { format!("{v:.2}") } else { format!("{v:.1}") };
        self.table.add_row([
            name.to_owned(),
            ms.len().to_string(),
            cell(p50),
            cell(p95),
            cell(p99),
            cell(max),
            "ms".to_owned(),
        ]);
        let all =
            json!({"n": ms.len(), "p50": p50, "p95": p95, "p99": p99, "max": max, "unit": "ms"});
        self.json.insert(name.to_owned(), all);
        p50
    }

    /// Adds one number.
    pub fn one(&mut self, name: &str, value: f64, unit: &str) {
        let cells = [name, "", &format!("{value:.1}"), "", "", "", unit];
        self.table.add_row(cells);
        self.json.insert(name.to_owned(), json!({"value": value, "unit": unit}));
    }

    /// Prints the table, and writes the JSON to a file.
    pub fn publish(self, path: &std::path::Path) -> std::io::Result<()> {
        println!("{}", self.table);
        std::fs::write(path, serde_json::to_vec_pretty(&Value::Object(self.json))?)?;
        println!("JSON: {}", path.display());
        Ok(())
    }
}
