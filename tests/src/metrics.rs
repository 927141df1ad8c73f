//! A strict reader of Prometheus' text format: what `promtool check metrics` would find fault with
//! fails the test.

use std::collections::{BTreeMap, BTreeSet};

use hyper::header::CONTENT_TYPE;

use crate::http::Client;

/// Names and values of one sample's labels.
pub type Labels = BTreeMap<String, String>;

/// What a scrape showed.
#[derive(Debug, Default)]
pub struct Scrape {
    kinds: BTreeMap<String, String>,
    samples: BTreeMap<(String, Labels), f64>,
}

/// Scrapes, and checks what comes.
#[track_caller]
pub fn scrape(client: &Client) -> Scrape {
    let answer = client.get("/metrics");
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    assert_eq!(answer.headers[CONTENT_TYPE], "text/plain; version=0.0.4; charset=utf-8");
    parse(std::str::from_utf8(&answer.body).unwrap()).unwrap_or_else(|e| panic!("{e}"))
}

impl Scrape {
    /// The value of one series.
    #[track_caller]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let found = self.find(name, labels);
        found.unwrap_or_else(|| panic!("no {name} {labels:?} in {:#?}", self.samples))
    }

    /// The value of one series, if it is there.
    pub fn find(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.samples.get(&(name.to_owned(), labels)).copied()
    }

    /// All series of a name.
    pub fn series(&self, name: &str) -> Vec<(&Labels, f64)> {
        let of = self.samples.iter().filter(|((n, _), _)| n == name);
        of.map(|((_, labels), value)| (labels, *value)).collect()
    }

    /// Names and kinds of all families.
    pub fn kinds(&self) -> &BTreeMap<String, String> {
        &self.kinds
    }
}

fn is_name(name: &str, colons: bool) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || (colons && b == b':');
    name.bytes().all(fits) && name.bytes().next().is_some_and(|b| !b.is_ascii_digit())
}

/// Reads a whole exposition.
pub fn parse(text: &str) -> Result<Scrape, String> {
    let mut found = Scrape::default();
    let mut helped = BTreeSet::new();
    let mut current = String::new();
    let body = text.strip_suffix('\n').ok_or("it does not end with a newline")?;
    for line in body.split('\n') {
        let bad = |why: &str| Err(format!("{why}: {line:?}"));
        if let Some(help) = line.strip_prefix("# HELP ") {
            let Some((name, words)) = help.split_once(' ') else { return bad("no help") };
            if !is_name(name, true) || words.trim().is_empty() || !helped.insert(name.to_owned()) {
                return bad("bad or second HELP");
            }
            current = name.to_owned();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let Some((name, kind)) = kind.split_once(' ') else { return bad("no type") };
            let known = ["counter", "gauge", "histogram"].contains(&kind);
            let second = found.kinds.insert(name.to_owned(), kind.to_owned()).is_some();
            if name != current || !known || second {
                return bad("TYPE that does not follow its HELP");
            }
            // What promtool's linter asks for.
            let total = name.ends_with("_total");
            if total != (kind == "counter")
                || ["_count", "_sum", "_bucket"].iter().any(|s| name.ends_with(s))
            {
                return bad("a name that says another type");
            }
        } else {
            let (name, labels, value) =
                sample(line).ok_or_else(|| format!("no sample: {line:?}"))?;
            let family = match found.kinds.get(&current).map(String::as_str) {
                Some("histogram") => {
                    let parts = ["_bucket", "_sum", "_count"];
                    parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(&name)
                }
                Some(kind) => {
                    if kind == "counter" && value < 0.0 {
                        return bad("a counter below 0");
                    }
                    &name
                }
                None => return bad("a sample without TYPE"),
            };
            if family != current {
                return bad("a sample of another family");
            }
            if found.samples.insert((name, labels), value).is_some() {
                return bad("a series twice");
            }
        }
    }
    for (name, kind) in &found.kinds {
        if kind == "histogram" {
            check_histogram(&found, name)?;
        }
    }
    Ok(found)
}

/// Buckets grow, the last one is `+Inf` and is the count.
fn check_histogram(found: &Scrape, name: &str) -> Result<(), String> {
    let mut buckets: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
    for (labels, count) in found.series(&format!("{name}_bucket")) {
        let mut labels = labels.clone();
        let upper = labels.remove("le").ok_or("a bucket without le")?;
        let upper = number(&upper).ok_or("a le that is no number")?;
        buckets.entry(labels).or_default().push((upper, count));
    }
    let counts = found.series(&format!("{name}_count"));
    if counts.len() != buckets.len() || counts.is_empty() {
        return Err(format!("{name}: buckets and counts differ"));
    }
    for (labels, count) in counts {
        let of = buckets.get_mut(labels).ok_or_else(|| format!("{name}: no buckets"))?;
        of.sort_by(|a, b| a.0.total_cmp(&b.0));
        let grows = of.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1);
        if !grows || of.last() != Some(&(f64::INFINITY, count)) {
            return Err(format!("{name}: {of:?} of {count}"));
        }
        if !found.samples.contains_key(&(format!("{name}_sum"), labels.clone())) {
            return Err(format!("{name}: no sum"));
        }
    }
    Ok(())
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        "-Inf" => Some(f64::NEG_INFINITY),
        _ => text.parse().ok().filter(|n: &f64| n.is_finite()),
    }
}

/// `name{label="value",…} number`, without a time.
fn sample(line: &str) -> Option<(String, Labels, f64)> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let mut labels = Labels::new();
    let mut rest = rest;
    if let Some(mut list) = rest.strip_prefix('{') {
        loop {
            if let Some(after) = list.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, after) = list.split_once("=\"")?;
            let (value, after) = quoted(after)?;
            if !is_name(label, false) || labels.insert(label.to_owned(), value).is_some() {
                return None;
            }
            list = after.strip_prefix(',').unwrap_or(after);
        }
    }
    let value = number(rest.strip_prefix(' ')?)?;
    is_name(name, true).then(|| (name.to_owned(), labels, value))
}

/// Up to the closing quote, which is taken.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                c @ ('\\' | '"') => c,
                _ => return None,
            }),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::parse;

    const GOOD: &str = "# HELP a_total x\n# TYPE a_total counter\na_total{b=\"q\\\"\\\\,}\"} 3\n\
        # HELP h x\n# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_bucket{le=\"+Inf\"} 3\nh_sum 4.5\n\
        h_count 3\n";

    #[test]
    fn what_is_right_is_read() {
        let found = parse(GOOD).unwrap();
        assert_eq!(found.value("a_total", &[("b", "q\"\\,}")]).to_bits(), 3_f64.to_bits());
        assert_eq!(found.series("h_bucket").len(), 2);
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for (from, to) in [
            ("h_count 3\n", "h_count 3"),
            ("h_count 3", "h_count 4"),
            ("le=\"1\"} 2", "le=\"1\"} 5"),
            ("h_sum 4.5\n", ""),
            ("h_sum 4.5", "i_sum 4.5"),
            ("} 3", "} three"),
            ("} 3", "} -3"),
            ("} 3", "} 3 1700000000"),
            ("# TYPE a_total counter\n", ""),
            ("# HELP a_total x\n", ""),
            ("counter", "gauge"),
            ("histogram", "summary"),
            ("{b=", "{1="),
            ("h_sum 4.5", "h_sum 4.5\nh_sum 4.5"),
        ] {
            assert!(GOOD.contains(from));
            assert!(parse(&GOOD.replacen(from, to, 1)).is_err(), "{from:?} {to:?}");
        }
    }
}
