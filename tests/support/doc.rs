//! The tables of faults in `docs/dev/faults.md` and of attacks in `docs/security.md`.

/// A line of a table: a fault, what the sidecar does, and the tests that show it.
pub struct Row {
    pub fault: String,
    pub does: String,
    pub tests: Vec<Shown>,
}

/// `file.rs::test` or `file.rs::test/row`; after one of these, `/row` is another row of the same test.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    pub file: String,
    pub test: String,
    pub row: Option<String>,
}

pub fn rows() -> Vec<Row> {
    let document = include_str!("../../docs/dev/faults.md");
    let lines = document.lines().filter(|line| line.starts_with('|'));
    let lines = lines.filter(|line| !line.starts_with("| --- ") && !line.starts_with("| fault |"));
    lines.map(row).collect()
}

/// The table of attacks: what the holder of a device tries, and what happens.
pub fn attacks() -> Vec<Row> {
    let (_, table) = include_str!("../../docs/security.md").split_once("<!-- each line").expect("the table");
    let lines = table.lines().skip(1).take_while(|line| line.starts_with('|'));
    lines.skip(2).map(row).collect()
}

fn row(line: &str) -> Row {
    let cells: Vec<_> = line.trim_matches('|').split(" | ").map(str::trim).collect();
    let [fault, does, tests] = *cells else { panic!("not three cells: {line}") };
    let mut shown: Vec<Shown> = Vec::new();
    for text in tests.split(", ") {
        let text = text.strip_prefix('`').and_then(|text| text.strip_suffix('`'));
        let text = text.unwrap_or_else(|| panic!("no test in {line}"));
        shown.push(match (text.split_once("::"), shown.last()) {
            (Some((file, test)), _) => {
                let (test, row) = test.split_once('/').map_or((test, None), |(test, row)| (test, Some(row.to_owned())));
                Shown { file: file.to_owned(), test: test.to_owned(), row }
            }
            (None, Some(last)) if text.starts_with('/') => Shown { row: Some(text[1..].to_owned()), ..last.clone() },
            _ => panic!("{text:?} is no test: {line}"),
        });
    }
    Row { fault: fault.to_owned(), does: does.to_owned(), tests: shown }
}
