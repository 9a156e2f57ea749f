//! What an hour costs, and what a refresh costs, beside what one would write instead and the floor. `scripts/bench` runs it.

mod api;
mod hour;
#[path = "../../tests/support"]
pub mod support {
    pub mod cloud;
    pub mod fleet;
    pub mod odata;
    pub mod recording;
    pub mod sidecar;
    pub mod tls;
}
mod table;

use std::hint::black_box;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};
use std::{env, fs, thread};

use baletheus::balena::{Device, PAGE_SIZE};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;

use api::{Api, Moment, Traffic};
use support::cloud::KEY;
use support::sidecar::{PATIENCE, Running, Sidecar, finish};
use table::{CURL, GO, GO_SHIPPED, Measure, OWN, PYTHON, SERDE, SHIPPED, Table, WITHOUT_SERVICES};

/// Measured refreshes and starts. The median counts.
const ROUNDS: usize = 7;
/// The numbers of devices that are measured unless others are named.
const SIZES: [u64; 5] = [100, 1000, 10_000, 20_000, 100_000];
/// How long an idle program is watched.
const WATCHED: Duration = Duration::from_secs(10);

fn main() {
    let args: Vec<String> = env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let sizes = |args: &[String]| -> Vec<u64> {
        if args.is_empty() {
            SIZES.into()
        } else {
            args.iter().map(|arg| arg.parse().expect("a number of devices")).collect()
        }
    };
    let rounds = |usual| env::var("ROUNDS").map_or(usual, |rounds| rounds.parse().expect("ROUNDS is a number"));
    match args.split_first() {
        Some((first, rest)) if first == "api" => api::serve(rest),
        Some((first, rest)) if first == "hour" => hour::run(&sizes(rest), rounds(hour::ROUNDS)),
        Some((first, rest)) if first == "refresh" => run(&sizes(rest), rounds(ROUNDS)),
        _ => {
            hour::run(&sizes(&args), rounds(hour::ROUNDS));
            run(&sizes(&args), rounds(ROUNDS));
        }
    }
}

fn run(sizes: &[u64], rounds: usize) {
    let binary = fs::metadata(path_of("BALETHEUS")).expect("it is built").len();
    let tables: Vec<Table> = sizes.iter().map(|devices| measure(*devices, rounds)).collect();
    println!("Medians of {rounds}.");
    for table in &tables {
        println!("\n{table}");
    }
    println!("\n{}", table::marks(&tables, binary));
}

/// The path of a program, from a variable that `scripts/bench` sets.
fn path_of(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run scripts/bench"))
}

/// The programs that discover: names, and the command lines that they begin with.
fn contenders() -> [(&'static str, Vec<String>); 4] {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/peer.py");
    [
        (SHIPPED, vec![path_of("BALETHEUS")]),
        (OWN, vec![path_of("BALETHEUS")]),
        (GO, vec![path_of("PEER_GO")]),
        (PYTHON, vec![path_of("PEER_PYTHON"), script.into()]),
    ]
}

/// A contender in a separate folder.
struct Racer {
    name: &'static str,
    sidecar: Sidecar,
    running: Option<Running>,
    /// How many refreshes wrote the file, by its log.
    updates: usize,
}

impl Racer {
    /// It refreshes, and asks for the state of the devices, this often.
    fn new((name, program): (&'static str, Vec<String>), api: &Api, [refresh, state]: [&str; 2]) -> Self {
        let sidecar = Sidecar::new(&program[0]).args(program[1..].iter().map(String::as_str));
        let list = sidecar.path("balena.json").display().to_string();
        let authority = api.authority();
        let has_tls = authority.exists();
        let authority = authority.display().to_string();
        let mut env = vec![
            ("BALENA_API_URL", &*api.url),
            ("API_KEY", KEY),
            ("SD_FILE_PATH", &list),
            ("EXPORTERS", "node:9100"),
            ("REFRESH_RATE", refresh),
        ];
        if has_tls {
            env.extend([("CA_FILE", &*authority), ("SSL_CERT_FILE", &*authority)]); // the second one is for Go
        }
        if name == WITHOUT_SERVICES {
            env.push(("DEVICE_SERVICES", "false"));
        }
        if [SHIPPED, WITHOUT_SERVICES, GO_SHIPPED].contains(&name) {
            env.extend([("LISTEN_ADDRESS", "127.0.0.1:0"), ("DEVICE_METRICS", "true"), ("DEVICE_REFRESH_RATE", state)]);
        }
        let sidecar = env.into_iter().fold(sidecar, |sidecar, (name, value)| sidecar.env(name, value));
        Racer { name, sidecar, running: None, updates: 0 }
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("it is started")
    }

    fn cpu(&self) -> Duration {
        let id = self.running().id().try_into().expect("an id");
        // that of all its threads, those that ended included
        let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(id)).expect("it lives");
        clock_gettime(clock).expect("it lives").into()
    }

    /// Its CPU time once it rests, so that work after a refresh counts as well.
    fn settled(&self) -> Duration {
        let (deadline, mut last) = (Instant::now() + PATIENCE, self.cpu());
        while Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
            let now = self.cpu();
            if now == last {
                return now;
            }
            last = now;
        }
        panic!("{} does not come to rest", self.name);
    }

    fn wait_for_update(&mut self) {
        self.updates += 1;
        self.running().wait_for_lines("updated", self.updates);
    }

    /// Starts it anew; CPU and wall time to its first file.
    fn start(&mut self) -> (Duration, Duration) {
        let _ = fs::remove_file(self.list());
        let start = Instant::now();
        (self.running, self.updates) = (Some(self.sidecar.start()), 0);
        self.wait_for_update();
        (self.cpu(), start.elapsed())
    }

    /// CPU and wall time from a start with `--oneshot` to its end.
    fn oneshot(&self) -> (Duration, Duration) {
        let _ = fs::remove_file(self.list());
        let mut command = self.sidecar.command();
        command.arg("--oneshot");
        run_once(command)
    }

    /// CPU and wall time of a refresh that changes the list.
    fn changed(&mut self) -> (Duration, Duration) {
        let (before, start) = (self.cpu(), Instant::now());
        self.running().signal("HUP");
        self.wait_for_update();
        let wall = start.elapsed();
        (self.settled() - before, wall)
    }

    /// CPU and wall time of a refresh that does not change the list, and the bytes that were sent for it. baletheus logs nothing then,
    /// so its wall time ends with the last of its answers.
    fn unchanged(&mut self, api: &mut Api, moment: Moment, pages: usize) -> (Duration, Duration, usize) {
        let (before, start) = (self.cpu(), SystemTime::now());
        self.running().signal("HUP");
        let end = (self.name != OWN && self.name != SHIPPED).then(|| {
            self.wait_for_update(); // since it writes all the same
            SystemTime::now()
        });
        let (deadline, mut asked, mut sent, mut last) = (Instant::now() + PATIENCE, 0, 0, start);
        while asked < pages {
            assert!(Instant::now() < deadline, "{} asks for {asked} of {pages} pages", self.name);
            thread::sleep(Duration::from_millis(5));
            let traffic = api.set(moment);
            (sent, last) = (sent + traffic.sent, traffic.last.unwrap_or(last));
            asked += traffic.of_discovery().len();
        }
        (self.settled() - before, end.unwrap_or(last).duration_since(start).unwrap_or_default(), sent)
    }

    /// CPU and wall time of one of two scrapes at once, and its size, as Prometheus asks for it.
    fn scraped(&self) -> (Duration, Duration, u64) {
        let (before, start) = (self.settled(), Instant::now());
        let size = thread::scope(|scope| {
            let other = scope.spawn(|| self.scrape().len());
            self.scrape().len().max(other.join().expect("a scrape"))
        });
        ((self.settled() - before) / 2, start.elapsed(), size as u64)
    }

    /// `/metrics` with gzip.
    fn scrape(&self) -> Vec<u8> {
        let url = self.running().wait_for("status on http://");
        let (_, url) = url.rsplit_once("status on ").expect("a URL");
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--header", "Accept-Encoding: gzip"]);
        curl.arg(format!("{url}/metrics"));
        let output = finish(curl);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn list(&self) -> PathBuf {
        self.sidecar.path("balena.json")
    }

    /// The number of the file, which changes when it is replaced, and its size in bytes.
    fn file(&self) -> (u64, u64) {
        fs::metadata(self.list()).map_or((0, 0), |file| (file.ino(), file.size()))
    }

    /// Each target with its labels, as JSON.
    fn targets(&self) -> Vec<String> {
        let list = fs::read(self.list()).expect("the list");
        let groups: Vec<Value> = serde_json::from_slice(&list).expect("JSON");
        let mut groups: Vec<String> = groups.iter().map(Value::to_string).collect();
        groups.sort();
        groups
    }

    /// How often its threads got the CPU.
    fn switches(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.running().id())).expect("it lives");
        let count = |task: &Path| status(task, "voluntary_ctxt_switches") + status(task, "nonvoluntary_ctxt_switches");
        tasks.map(|task| count(&task.expect("a thread").path())).sum()
    }

    /// A size from its `status` in `/proc`, in KiB.
    fn memory(&self, name: &str) -> u64 {
        status(Path::new(&format!("/proc/{}", self.running().id())), name)
    }
}

/// A field of a `status` in `/proc` that is a number.
fn status(of: &Path, name: &str) -> u64 {
    let status = fs::read_to_string(of.join("status")).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a field");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}

/// CPU and wall time of a program from start to end.
fn run_once(command: Command) -> (Duration, Duration) {
    let (before, start) = (children(), Instant::now());
    let output = finish(command);
    let wall = start.elapsed();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (children() - before, wall)
}

/// CPU time of all children that ended.
fn children() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("it can be told");
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Duration::from_micros(micros.try_into().expect("a time"))
}

/// curl, for all of these pages with one connection; `compressed`, or into files of this folder.
fn curl(api: &Api, pages: &[String], into: Option<&Path>) -> Command {
    let mut command = Command::new("curl");
    command.args([
        "--silent",
        "--show-error",
        "--fail",
        "--globoff",
        "--header",
        &format!("Authorization: Bearer {KEY}"),
    ]);
    if into.is_none() {
        command.arg("--compressed");
    }
    for (number, page) in pages.iter().enumerate() {
        let file = into.map_or("/dev/null".into(), |folder| folder.join(number.to_string()));
        command.arg("--output").arg(file).arg(format!("{}{page}", api.url));
    }
    command
}

/// CPU and wall time of parsing these pages, typed, one after the other.
fn parse(bodies: &[Vec<u8>]) -> (Duration, Duration) {
    #[derive(Deserialize)]
    struct Page<'a> {
        #[serde(borrow)]
        d: Vec<Device<'a>>,
    }
    let cpu = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("our own"));
    let (before, start) = (cpu(), Instant::now());
    for body in bodies {
        let page: Page = serde_json::from_slice(black_box(body)).expect("a page");
        black_box(page.d);
    }
    (cpu() - before, start.elapsed())
}

/// Waits for the requests for the state of the devices, for their services and for the reports, which come once, and until it rests.
/// They do not belong to a refresh.
fn wait_for_state(api: &mut Api, racer: &Racer, devices: u64) {
    let (mut traffic, deadline) = (Traffic::default(), Instant::now() + PATIENCE);
    let asked = |traffic: &Traffic, what| traffic.pages.iter().filter(|page| page.contains(what)).count() as u64;
    while ["api_heartbeat_state", "image_install", "memory_usage"]
        .iter()
        .any(|what| asked(&traffic, *what) < devices / PAGE_SIZE as u64 + 1)
    {
        assert!(Instant::now() < deadline, "the state is not asked for: {:?}", traffic.pages);
        thread::sleep(Duration::from_millis(20));
        traffic.add(api.set(Moment::First));
    }
    racer.settled();
}

fn measure(devices: u64, rounds: usize) -> Table {
    use Measure::*;
    let (mut table, mut api) = (Table::new(devices), Api::start(devices));
    let mut racers = contenders().map(|is| Racer::new(is, &api, ["1h", "1h"]));
    let mut starters = contenders().map(|is| Racer::new(is, &api, ["1h", "1h"]));
    // A round that does not count: it makes all answers, and everything that happens only once.
    let mut pages = Vec::new();
    for racer in &mut racers {
        racer.start();
        if racer.name == SHIPPED {
            wait_for_state(&mut api, racer, devices);
        }
        for moment in [Moment::Other, Moment::First] {
            api.set(moment);
            racer.changed();
            pages = api.set(moment).of_discovery();
            racer.unchanged(&mut api, moment, pages.len());
        }
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    run_once(curl(&api, &pages, Some(folder.path())));
    let body = |number: usize| fs::read(folder.path().join(number.to_string())).expect("a page");
    let bodies: Vec<_> = (0..pages.len()).map(body).collect();

    for round in 0..rounds {
        let moment = if round % 2 == 0 { Moment::Other } else { Moment::First };
        api.set(moment);
        for racer in &mut racers {
            let before = racer.file();
            table.times([ChangedCpu, ChangedWall], racer.name, racer.changed());
            table.bytes(ChangedReceived, racer.name, api.set(moment).sent as u64);
            table.bytes(ChangedWritten, racer.name, written(before, racer.file()));
        }
        for racer in &mut racers {
            let before = racer.file();
            let (cpu, wall, sent) = racer.unchanged(&mut api, moment, pages.len());
            table.times([UnchangedCpu, UnchangedWall], racer.name, (cpu, wall));
            table.bytes(UnchangedReceived, racer.name, sent as u64);
            table.bytes(UnchangedWritten, racer.name, written(before, racer.file()));
        }
        for racer in racers.iter().filter(|racer| racer.name == SHIPPED) {
            let (cpu, wall, size) = racer.scraped();
            table.times([ScrapeCpu, ScrapeWall], racer.name, (cpu, wall));
            table.bytes(ScrapeSize, racer.name, size);
        }
        let lists = racers.each_ref().map(Racer::targets);
        assert!(lists.iter().all(|list| *list == lists[0]), "the lists differ");
        for racer in &mut starters {
            table.times([OneshotCpu, OneshotWall], racer.name, racer.oneshot());
            table.times([FirstFileCpu, FirstFileWall], racer.name, racer.start());
            racer.running = None;
        }
        table.times([ChangedCpu, ChangedWall], CURL, run_once(curl(&api, &pages, None)));
        table.times([ChangedCpu, ChangedWall], SERDE, parse(&bodies));
    }

    let deadline = Instant::now() + PATIENCE;
    while api.set(Moment::First).open > 0 {
        assert!(Instant::now() < deadline, "connections stay open");
        thread::sleep(Duration::from_millis(100));
    }
    for racer in &racers {
        table.bytes(Peak, racer.name, racer.memory("VmHWM") << 10);
        table.bytes(Idle, racer.name, racer.memory("VmRSS") << 10);
    }
    let before = racers.each_ref().map(Racer::switches);
    thread::sleep(WATCHED);
    for (racer, before) in racers.iter().zip(before) {
        table.count(Wakeups, racer.name, racer.switches() - before);
    }
    table
}

fn written(before: (u64, u64), after: (u64, u64)) -> u64 {
    if after == before { 0 } else { after.1 }
}
