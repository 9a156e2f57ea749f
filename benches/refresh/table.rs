//! The measurements as tables in Markdown, and a comparison with the goals.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::time::Duration;

/// With the status endpoint, metrics of devices, and two scrapes at once after each changed refresh.
pub const SHIPPED: &str = "as shipped";
/// As shipped, with `--device-services=false`.
pub const WITHOUT_SERVICES: &str = "without services";
/// Discovery alone.
pub const OWN: &str = "discovery alone";
pub const GO: &str = "Go";
/// As shipped without services, in Go, with Prometheus' client library.
pub const GO_SHIPPED: &str = "Go, without services";
pub const PYTHON: &str = "Python";
pub const CURL: &str = "curl";
pub const SERDE: &str = "serde_json";

/// What is measured; times in ms, the rest in KiB unless the title says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Measure {
    ChangedCpu,
    ChangedWall,
    ChangedReceived,
    ChangedWritten,
    UnchangedCpu,
    UnchangedWall,
    UnchangedReceived,
    UnchangedWritten,
    OneshotCpu,
    OneshotWall,
    FirstFileCpu,
    FirstFileWall,
    ScrapeCpu,
    ScrapeWall,
    ScrapeSize,
    Peak,
    Idle,
    Wakeups,
}

use Measure::{
    ChangedCpu, ChangedReceived, ChangedWall, ChangedWritten, FirstFileCpu, FirstFileWall, Idle, OneshotCpu,
    OneshotWall, Peak, ScrapeCpu, ScrapeSize, ScrapeWall, UnchangedCpu, UnchangedReceived, UnchangedWall,
    UnchangedWritten, Wakeups,
};

const TITLES: [(Measure, &str); 18] = [
    (ChangedCpu, "1% changed: CPU, ms"),
    (ChangedWall, "wall, ms"),
    (ChangedReceived, "received, KiB"),
    (ChangedWritten, "written, KiB"),
    (UnchangedCpu, "nothing changed: CPU, ms"),
    (UnchangedWall, "wall, ms"),
    (UnchangedReceived, "received, KiB"),
    (UnchangedWritten, "written, KiB"),
    (OneshotCpu, "cold `--oneshot`: CPU, ms"),
    (OneshotWall, "wall, ms"),
    (FirstFileCpu, "start to first file: CPU, ms"),
    (FirstFileWall, "wall, ms"),
    (ScrapeCpu, "a scrape, one of two at once: CPU, ms"),
    (ScrapeWall, "wall of both, ms"),
    (ScrapeSize, "size with gzip, KiB"),
    (Peak, "peak memory, KiB"),
    (Idle, "idle memory, KiB"),
    (Wakeups, "wake-ups in 10 s of rest"),
];

/// All measurements with one number of devices.
pub struct Table {
    devices: u64,
    samples: BTreeMap<(Measure, &'static str), Vec<f64>>,
}

impl Table {
    pub fn new(devices: u64) -> Self {
        Table { devices, samples: BTreeMap::new() }
    }

    #[allow(clippy::cast_precision_loss)] // far below
    pub fn count(&mut self, measure: Measure, of: &'static str, value: u64) {
        self.samples.entry((measure, of)).or_default().push(value as f64);
    }

    pub fn bytes(&mut self, measure: Measure, of: &'static str, bytes: u64) {
        self.count(measure, of, bytes);
        if let Some(last) = self.samples.get_mut(&(measure, of)).and_then(|all| all.last_mut()) {
            *last /= 1024.0;
        }
    }

    pub fn times(&mut self, [cpu, wall]: [Measure; 2], of: &'static str, times: (Duration, Duration)) {
        for (measure, time) in [(cpu, times.0), (wall, times.1)] {
            self.samples.entry((measure, of)).or_default().push(time.as_secs_f64() * 1e3);
        }
    }

    /// The median.
    fn get(&self, measure: Measure, of: &'static str) -> Option<f64> {
        let mut samples = self.samples.get(&(measure, of))?.clone();
        samples.sort_by(f64::total_cmp);
        samples.get(samples.len() / 2).copied()
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let all = [SHIPPED, OWN, GO, PYTHON, CURL, SERDE];
        writeln!(f, "| {} devices | {} |", self.devices, all.join(" | "))?;
        writeln!(f, "| --- | {} |", all.map(|_| "---:").join(" | "))?;
        for (measure, title) in TITLES {
            let shown = all.map(|of| self.get(measure, of).map_or(String::new(), shown));
            writeln!(f, "| {title} | {} |", shown.join(" | "))?;
        }
        Ok(())
    }
}

/// Three significant digits.
pub fn shown(value: f64) -> String {
    let digits = if value >= 100.0 || value == 0.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$}")
}

/// The goals, as ratios of medians in this run.
pub fn marks(tables: &[Table], binary: u64) -> String {
    let mut text = "| mark | at most | measured |\n| --- | ---: | ---: |\n".to_owned();
    let mut mark = |what: &str, most: f64, measured: Option<f64>| {
        let Some(measured) = measured else { return };
        let verdict = if measured <= most { "" } else { " ✗" };
        text += &format!("| {what} | {} | {}{verdict} |\n", shown(most), shown(measured));
    };
    let at = |devices| tables.iter().find(|table| table.devices == devices);
    let of = |devices, measure, name| at(devices)?.get(measure, name);
    let ratio = |one: Option<f64>, other: Option<f64>| Some(one? / other?);
    let (mid, large) = (10_000, 100_000);
    let changed = of(mid, ChangedCpu, OWN);
    mark("1% changed, CPU, 10,000 devices: of Go's", 0.25, ratio(changed, of(mid, ChangedCpu, GO)));
    mark("of Python's", 0.125, ratio(changed, of(mid, ChangedCpu, PYTHON)));
    let floor = of(mid, ChangedCpu, CURL).zip(of(mid, ChangedCpu, SERDE)).map(|(curl, serde)| curl + serde);
    mark("of curl's and serde_json's", 1.6, ratio(changed, floor));
    mark("nothing changed, CPU, 10,000 devices: of a changed one's", 0.02, ratio(of(mid, UnchangedCpu, OWN), changed));
    mark("received, KB", 10.0, of(mid, UnchangedReceived, OWN).map(|kib| kib * 1.024));
    mark("written", 0.0, of(mid, UnchangedWritten, OWN));
    let each = of(large, ChangedCpu, OWN).map(|all| all / 10.0);
    mark("1% changed, CPU of a device at 100,000: of one's at 10,000", 1.15, ratio(each, changed));
    mark(
        "as shipped, 10,000 devices: 1% changed, CPU: of discovery's alone",
        1.3,
        ratio(of(mid, ChangedCpu, SHIPPED), changed),
    );
    mark("as shipped, peak memory, 1,000 devices, MiB", 14.0, of(1000, Peak, SHIPPED).map(|kib| kib / 1024.0));
    mark("20,000 devices, MiB", 48.0, of(20_000, Peak, SHIPPED).map(|kib| kib / 1024.0));
    mark("100,000 devices: of discovery's alone", 2.5, ratio(of(large, Peak, SHIPPED), of(large, Peak, OWN)));
    mark("peak memory, 1,000 devices, MiB", 12.0, of(1000, Peak, OWN).map(|kib| kib / 1024.0));
    let most = of(large, ChangedWritten, OWN).map(|file| 1.2 * file + 16.0 * 1024.0);
    mark("peak memory, 100,000 devices: of 1.2 times the file and 16 MiB", 1.0, ratio(of(large, Peak, OWN), most));
    mark("wake-ups in 10 s of rest", 0.0, tables.first().and_then(|table| table.get(Wakeups, OWN)));
    mark("start to first file, 1,000 devices, CPU, ms", 60.0, of(1000, FirstFileCpu, OWN));
    #[allow(clippy::cast_precision_loss)] // far below
    mark("binary, MiB", 6.0, Some(binary as f64 / f64::from(1 << 20)));
    text
}
