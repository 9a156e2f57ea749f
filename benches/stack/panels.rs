//! What browsers ask with the stack's dashboards open: the queries of all panels, with one device and one job chosen.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use reqwest::Url;
use reqwest::blocking::Client;

use crate::support::grafana::{Dashboard, dashboards, interpolate, list, text};

/// As many as a browser asks at once.
const AT_ONCE: usize = 6;
/// What the dashboards show, and the distance of its points.
const RANGE: u64 = 6 * 3600;
const STEP: u64 = 60;

pub struct Query {
    /// Dashboard and panel.
    pub name: String,
    expr: String,
    instant: bool,
}

fn values(dashboard: &Dashboard, device: &str) -> BTreeMap<String, String> {
    let own =
        [("__rate_interval", "4m"), ("__interval", "1m"), ("__range", "6h"), ("device", device), ("job", "node.*")];
    let mut values: BTreeMap<_, _> = own.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    for variable in dashboard.variables() {
        let first = || list(variable, "/options").first().map_or("", |option| text(option, "value"));
        let value = if variable["includeAll"] == true { text(variable, "allValue") } else { first() };
        values.entry(text(variable, "name").to_owned()).or_insert_with(|| value.to_owned());
    }
    values
}

pub fn queries(device: &str) -> Vec<Query> {
    let mut all = Vec::new();
    for dashboard in dashboards() {
        let values = values(&dashboard, device);
        for panel in dashboard.panels() {
            for target in list(panel, "/targets") {
                let name = format!("{}: {}", dashboard.file, text(panel, "title"));
                let expr = interpolate(text(target, "expr"), &values);
                all.push(Query { name, expr, instant: target["instant"] == true });
            }
        }
    }
    all
}

/// What was asked so far.
#[derive(Default)]
pub struct Asked {
    /// The longest time of each query.
    pub slowest: Vec<Duration>,
    /// How long it took to ask all of them, each time.
    pub rounds: Vec<Duration>,
    pub unanswered: usize,
}

/// Asks all of them this often, as long as the program runs.
pub fn keep_asking(prometheus: String, queries: Arc<Vec<Query>>, every: Duration) -> Arc<Mutex<Asked>> {
    let asked = Arc::new(Mutex::new(Asked { slowest: vec![Duration::ZERO; queries.len()], ..Asked::default() }));
    let client = Client::builder().no_proxy().timeout(Duration::from_secs(120)).build().expect("a client");
    let result = asked.clone();
    thread::spawn(move || {
        loop {
            let begin = Instant::now();
            let times = ask(&client, &prometheus, &queries);
            let mut asked = asked.lock().expect("no thread has panicked");
            asked.rounds.push(begin.elapsed());
            for (slowest, time) in asked.slowest.iter_mut().zip(&times) {
                *slowest = (*slowest).max(time.unwrap_or_default());
            }
            asked.unanswered += times.iter().filter(|time| time.is_none()).count();
            drop(asked);
            thread::sleep(every.saturating_sub(begin.elapsed()));
        }
    });
    result
}

/// How long each took; none for those without an answer.
fn ask(client: &Client, prometheus: &str, queries: &[Query]) -> Vec<Option<Duration>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time").as_secs();
    let range = [(now - RANGE).to_string(), now.to_string(), STEP.to_string()];
    let (next, times) = (AtomicUsize::new(0), Mutex::new(vec![None; queries.len()]));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(query) = queries.get(at) else { return };
                    let begin = Instant::now();
                    let answer = client.get(query.url(prometheus, &range)).send();
                    if answer.and_then(|answer| answer.error_for_status()?.bytes()).is_ok() {
                        times.lock().expect("no thread has panicked")[at] = Some(begin.elapsed());
                    }
                }
            });
        }
    });
    times.into_inner().expect("no thread has panicked")
}

impl Query {
    fn url(&self, prometheus: &str, range: &[String; 3]) -> Url {
        let mut parameters = vec![("query", &self.expr)];
        if !self.instant {
            parameters.extend(["start", "end", "step"].into_iter().zip(range));
        }
        let path = if self.instant { "query" } else { "query_range" };
        Url::parse_with_params(&format!("{prometheus}/api/v1/{path}"), parameters).expect("a URL")
    }
}
