//! What an hour costs. Nobody waits for it: a minute of the program and of the API takes some seconds, and only a part of the hour
//! is measured where all of it would take long. Each minute has one or two refreshes, a request for the state of the devices, and
//! a scrape with gzip.

use std::collections::BTreeMap;
use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;

use crate::api::{Api, Moment, Traffic};
use crate::support::sidecar::PATIENCE;
use crate::table::{GO_SHIPPED, OWN, SHIPPED, shown};
use crate::{Racer, path_of};

/// Hours of which the median is told.
pub const ROUNDS: usize = 3;

/// What is measured, with its unit.
const TITLES: [(&str, f64); 7] = [
    ("CPU, s", 1.0),
    ("to the API, MB", 1e6),
    ("from the API, MB", 1e6),
    ("connections to the API", 1.0),
    ("written, MB", 1e6),
    ("scraped with gzip, MB", 1e6),
    ("peak memory, MiB", 1_048_576.0),
];

type Samples = BTreeMap<&'static str, Vec<[f64; TITLES.len()]>>;

/// How an hour is measured with so many devices.
#[derive(Clone, Copy)]
struct Plan {
    /// How long a minute takes.
    minute: Duration,
    minutes: u32,
    /// Whether all programs run at once.
    at_once: bool,
}

impl Plan {
    fn of(devices: u64) -> Self {
        let (minute, minutes) = match devices {
            0..=1000 => (2, 60),
            1001..=20_000 => (3, 15),
            _ => (10, 5),
        };
        Plan { minute: Duration::from_secs(minute), minutes, at_once: devices <= 1000 }
    }

    fn api(self, devices: u64) -> Api {
        Api::fast(devices, (60.0 / self.minute.as_secs_f64()) as u32)
    }
}

pub fn run(sizes: &[u64], rounds: usize) {
    println!("Medians of {rounds}.");
    for refreshes in [2, 1] {
        println!(
            "\n| refresh every {} s | as shipped | discovery alone | Go, as shipped | of alone | of Go |",
            60 / refreshes
        );
        println!("| --- | ---: | ---: | ---: | ---: | ---: |");
        for devices in sizes {
            let plan = Plan::of(*devices);
            let mut samples = Samples::new();
            let mut shared = (!plan.at_once).then(|| plan.api(*devices));
            for _ in 0..rounds {
                let measured = match &mut shared {
                    Some(api) => contenders().map(|is| hour(is, api, plan, refreshes)),
                    None => at_once(*devices, plan, refreshes),
                };
                let series: Vec<_> = measured.iter().filter(|(_, _, series)| *series > 0).collect();
                assert!(series.iter().all(|one| one.2 == series[0].2), "the series differ: {series:?}");
                for (name, sample, _) in measured {
                    samples.entry(name).or_default().push(sample);
                }
            }
            print(*devices, &samples);
        }
    }
}

fn contenders() -> [(&'static str, Vec<String>); 3] {
    [
        (SHIPPED, vec![path_of("BALETHEUS")]),
        (OWN, vec![path_of("BALETHEUS")]),
        (GO_SHIPPED, vec![path_of("PEER_GO_SHIPPED")]),
    ]
}

type Measured = (&'static str, [f64; TITLES.len()], usize);

fn at_once(devices: u64, plan: Plan, refreshes: u32) -> [Measured; 3] {
    thread::scope(|scope| {
        let running = contenders().map(|is| scope.spawn(move || hour(is, &mut plan.api(devices), plan, refreshes)));
        running.map(|one| one.join().expect("an hour"))
    })
}

/// What one program takes for an hour, and how many series of devices it shows.
fn hour(is: (&'static str, Vec<String>), api: &mut Api, plan: Plan, refreshes: u32) -> Measured {
    let refresh = plan.minute / refreshes;
    let mut racer = Racer::new(is, api, [&format!("{}ms", refresh.as_millis()), "1s"]);
    let is_shipped = racer.name != OWN;
    api.set(Moment::Minute(0));
    let start = Instant::now();
    racer.start();
    let series = if is_shipped { wait_for_states(&racer) } else { 0 };
    // Minutes begin between two refreshes.
    let begun = start.elapsed().as_secs_f64() / plan.minute.as_secs_f64();
    let start = start + plan.minute * (begun as u32 + 1) + refresh.mul_f64(0.4);
    sleep_until(start);
    let updates = |racer: &Racer| racer.running().log().iter().filter(|line| line.contains("updated")).count();
    let (cpu, written) = (racer.cpu(), updates(&racer));
    let (mut traffic, mut scraped) = (Traffic::default(), 0);
    api.set(Moment::Minute(0));
    for minute in 1..=plan.minutes {
        traffic.add(api.set(Moment::Minute(minute.into())));
        let end = start + plan.minute * minute;
        sleep_until(end - plan.minute / 2);
        if is_shipped {
            scraped += racer.scrape().len();
        }
        sleep_until(end);
    }
    let hours = f64::from(60 / plan.minutes);
    let cpu = (racer.cpu() - cpu).as_secs_f64();
    let written = (updates(&racer) - written) as u64 * racer.file().1;
    let peak = racer.memory("VmHWM") << 10;
    racer.running = None;
    traffic.add(api.set(Moment::First)); // lets go of a request that was held, too
    let expected = [plan.minutes * refreshes, if is_shipped { plan.minutes } else { 0 }];
    let Traffic { wire, opened, .. } = traffic;
    let of_hour = |count: f64| count * hours;
    let sample = [
        of_hour(cpu),
        of_hour(wire[0] as f64),
        of_hour(wire[1] as f64),
        of_hour(opened as f64),
        of_hour(written as f64),
        of_hour(scraped as f64),
        peak as f64,
    ];
    eprintln!("{}: {:?} rounds of {expected:?}, {sample:?}", racer.name, traffic.rounds());
    (racer.name, sample, series)
}

/// Waits until the state of the devices is known, and gives the number of their series.
fn wait_for_states(racer: &Racer) -> usize {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut text = String::new();
        GzDecoder::new(&*racer.scrape()).read_to_string(&mut text).expect("a whole answer");
        if text.contains("\nbalena_device_online{") {
            return text.lines().filter(|line| line.starts_with("balena_device_")).count();
        }
        assert!(Instant::now() < deadline, "{} does not know the state of the devices", racer.name);
        thread::sleep(Duration::from_millis(50));
    }
}

fn sleep_until(until: Instant) {
    thread::sleep(until.saturating_duration_since(Instant::now()));
}

fn print(devices: u64, samples: &Samples) {
    for (at, (title, unit)) in TITLES.into_iter().enumerate() {
        let median = |name| {
            let mut all: Vec<_> = samples.get(name)?.iter().map(|sample| sample[at] / unit).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied()
        };
        let all = [SHIPPED, OWN, GO_SHIPPED].map(median);
        let ratio = |other: Option<f64>| Some(all[0]? / other.filter(|other| *other > 0.0)?);
        let cells = all.into_iter().chain([ratio(all[1]), ratio(all[2])]);
        let cells: Vec<_> = cells.map(|value| value.map_or(String::new(), shown)).collect();
        let title = if at == 0 { format!("**{devices} devices**: {title}") } else { title.into() };
        println!("| {title} | {} |", cells.join(" | "));
    }
}
