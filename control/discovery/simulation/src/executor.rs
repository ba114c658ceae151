//! One thread that runs everything: the members' tasks, their disks and network, the clients, the faults.
//!
//! Time passes only when nobody has anything to do, and a little with each poll. Which of the tasks that are ready goes
//! next is drawn from the seed. A task belongs to a process; a process can be killed (its tasks are dropped where they
//! stand) or stopped, and has a clock of its own, which may run fast or slow or leap ahead. Process 0, the world, has
//! the true time.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

/// A process. Each start of a member is another one.
pub(crate) type Process = u64;
/// Where network, clients and faults run.
pub(crate) const WORLD: Process = 0;

/// Where clocks begin, so that a look back does not go below zero.
const EPOCH: u64 = 1_000_000_000_000_000;
/// Without an end after this many polls, something turns in a circle.
const MAX_POLLS: u64 = 20_000_000;

type Job = Pin<Box<dyn Future<Output = ()>>>;

/// A clock in nanoseconds: what it shows at a moment of true time, and how fast it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    moment: u64,
    shown: u64,
    per_mille: u64,
}

impl Clock {
    fn at(self, now: u64) -> u64 {
        self.shown + (now - self.moment) * self.per_mille / 1000
    }

    /// When it will show this.
    fn moment_of(self, shown: u64) -> u64 {
        self.moment + (shown.saturating_sub(self.shown) * 1000).div_ceil(self.per_mille)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            moment: EPOCH,
            shown: EPOCH,
            per_mille: 1000,
        }
    }
}

#[derive(Default)]
struct Running {
    clock: Clock,
    stopped: bool,
    ready: BTreeSet<u64>,
    timers: BTreeMap<(u64, u64), Waker>,
}

struct Task {
    process: Process,
    /// Away while it is polled.
    job: Option<Job>,
    waker: Arc<TaskWaker>,
}

struct TaskWaker {
    task: u64,
    queued: AtomicBool,
    woken: Arc<Mutex<Vec<u64>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            self.woken.lock().unwrap().push(self.task);
        }
    }
}

struct World {
    now: u64,
    random: StdRng,
    /// Whose task is polled.
    current: Process,
    processes: BTreeMap<Process, Running>,
    tasks: BTreeMap<u64, Task>,
    woken: Arc<Mutex<Vec<u64>>>,
    /// The last number that was given to a task, a timer or a process.
    last: u64,
    polls: u64,
    /// A digest of all polls: who, and when.
    trace: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            now: EPOCH,
            random: StdRng::seed_from_u64(seed),
            current: WORLD,
            processes: BTreeMap::from([(WORLD, Running::default())]),
            tasks: BTreeMap::new(),
            woken: Arc::default(),
            last: 0,
            polls: 0,
            trace: 0xcbf2_9ce4_8422_2325,
        }
    }

    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn collect_woken(&mut self) {
        let mut woken = self.woken.lock().unwrap();
        for id in woken.drain(..) {
            if let Some(task) = self.tasks.get(&id)
                && let Some(process) = self.processes.get_mut(&task.process)
            {
                process.ready.insert(id);
            }
        }
    }

    /// Wakes whose time has come.
    fn fire(&mut self) {
        for process in self.processes.values_mut().filter(|process| !process.stopped) {
            let shown = process.clock.at(self.now);
            while let Some(first) = process.timers.first_entry()
                && first.key().0 <= shown
            {
                first.remove().wake();
            }
        }
        self.collect_woken();
    }

    /// The next task, drawn from those that are ready.
    fn next(&mut self) -> Option<u64> {
        let running = || self.processes.values().filter(|process| !process.stopped);
        let ready: usize = running().map(|process| process.ready.len()).sum();
        if ready == 0 {
            return None;
        }
        let mut nth = if ready == 1 {
            0
        } else {
            self.random.random_range(0..ready)
        };
        for process in self.processes.values_mut().filter(|process| !process.stopped) {
            if nth < process.ready.len() {
                let id = *process.ready.iter().nth(nth)?;
                process.ready.remove(&id);
                return Some(id);
            }
            nth -= process.ready.len();
        }
        None
    }

    /// Lets the time pass until somebody has something to do.
    fn wait(&mut self) {
        let running = self.processes.values().filter(|process| !process.stopped);
        let next = running.filter_map(|process| {
            let (shown, _) = process.timers.first_key_value()?.0;
            Some(process.clock.moment_of(*shown))
        });
        let next = next.min().expect("nobody will ever do anything again");
        self.now = self.now.max(next);
        self.fire();
    }
}

thread_local! {
    static THE_WORLD: RefCell<World> = RefCell::new(World::new(0));
}

fn with<T>(look: impl FnOnce(&mut World) -> T) -> T {
    THE_WORLD.with_borrow_mut(look)
}

/// Runs `main` in a new world, and gives what came of it with a digest of all that happened.
pub(crate) fn run<T: 'static>(seed: u64, main: impl Future<Output = T> + 'static) -> (T, u64) {
    let _end = End;
    with(|world| *world = World::new(seed));
    let mut main = spawn_on(WORLD, main);
    let result = loop {
        let mut unused = Context::from_waker(Waker::noop());
        if let Poll::Ready(result) = Pin::new(&mut main).poll(&mut unused) {
            break result.unwrap_or_else(|never| match never {});
        }
        step();
    };
    (result, with(|world| world.trace))
}

/// Ends the world, also after a panic.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        // Not dropped while it is borrowed: what is dropped may look at the clock.
        drop(THE_WORLD.replace(World::new(0)));
    }
}

fn step() {
    let (id, mut job, waker) = with(|world| {
        world.collect_woken();
        if world.polls.is_multiple_of(8) {
            world.fire();
        }
        let id = loop {
            match world.next() {
                // It may have ended since.
                Some(id) if world.tasks.contains_key(&id) => break id,
                Some(_) => {}
                None => world.wait(),
            }
        };
        world.polls += 1;
        assert!(world.polls < MAX_POLLS, "it does not come to an end");
        world.now += world.random.random_range(500..4_000);
        for word in [id, world.now] {
            world.trace = (world.trace ^ word).wrapping_mul(0x0100_0000_01b3);
        }
        let task = world.tasks.get_mut(&id).unwrap();
        world.current = task.process;
        task.waker.queued.store(false, Ordering::Relaxed);
        (id, task.job.take().unwrap(), Arc::clone(&task.waker))
    });
    let polled = job.as_mut().poll(&mut Context::from_waker(&Waker::from(waker)));
    let over = with(|world| match world.tasks.get_mut(&id) {
        Some(task) if polled.is_pending() => {
            task.job = Some(job);
            None
        }
        _ => {
            world.tasks.remove(&id);
            Some(job)
        }
    });
    drop(over);
    with(|world| world.current = WORLD);
}

/// Starts a process whose clock is that one.
pub(crate) fn start(clock: Clock) -> Process {
    with(|world| {
        let process = world.number();
        let running = Running {
            clock,
            ..Running::default()
        };
        world.processes.insert(process, running);
        process
    })
}

/// Ends a process, wherever its tasks stand.
pub(crate) fn kill(process: Process) {
    let (tasks, before) = with(|world| {
        world.processes.remove(&process);
        let ids: Vec<u64> = world
            .tasks
            .iter()
            .filter(|(_, task)| task.process == process)
            .map(|(id, _)| *id)
            .collect();
        let tasks: Vec<Task> = ids.iter().filter_map(|id| world.tasks.remove(id)).collect();
        (tasks, std::mem::replace(&mut world.current, process))
    });
    drop(tasks);
    with(|world| world.current = before);
}

/// Stops a process, or lets it go on. Its clock runs on.
pub(crate) fn stop(process: Process, stopped: bool) {
    with(|world| {
        if let Some(running) = world.processes.get_mut(&process) {
            running.stopped = stopped;
        }
    });
}

/// A process's clock.
pub(crate) fn clock(process: Process) -> Clock {
    with(|world| {
        world
            .processes
            .get(&process)
            .map(|running| running.clock)
            .unwrap_or_default()
    })
}

/// Changes a clock: it leaps ahead, and runs that fast from now on.
pub(crate) fn turn(clock: &mut Clock, leap: Duration, per_mille: u64) {
    let now = with(|world| world.now);
    *clock = Clock {
        moment: now,
        shown: clock.at(now) + nanos(leap),
        per_mille,
    };
}

/// Gives a process that clock.
pub(crate) fn set_clock(process: Process, clock: Clock) {
    with(|world| {
        if let Some(running) = world.processes.get_mut(&process) {
            running.clock = clock;
        }
    });
}

/// What the clock of the present process shows, in nanoseconds.
pub(crate) fn shown() -> u64 {
    with(|world| match world.processes.get(&world.current) {
        Some(running) => running.clock.at(world.now),
        None => world.now,
    })
}

/// The true time since the beginning.
pub(crate) fn elapsed() -> Duration {
    with(|world| Duration::from_nanos(world.now - EPOCH))
}

/// Draws from the seed.
pub(crate) fn draw<T>(draw: impl FnOnce(&mut StdRng) -> T) -> T {
    with(|world| draw(&mut world.random))
}

/// A generator of its own, drawn from the seed.
pub(crate) fn generator() -> StdRng {
    StdRng::seed_from_u64(draw(StdRng::next_u64))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4)
}

/// What a task gives. Pending for ever when its process is killed.
#[derive(Debug)]
pub(crate) struct Join<T>(Arc<Mutex<(Option<T>, Option<Waker>)>>);

impl<T> Future for Join<T> {
    type Output = Result<T, std::convert::Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut slot = self.0.lock().unwrap();
        if let Some(result) = slot.0.take() {
            return Poll::Ready(Ok(result));
        }
        slot.1 = Some(context.waker().clone());
        Poll::Pending
    }
}

/// Runs `future` in the present process.
pub(crate) fn spawn<F: Future<Output: 'static> + 'static>(future: F) -> Join<F::Output> {
    let current = with(|world| world.current);
    spawn_on(current, future)
}

/// Runs `future` in that process; nothing happens when that is no more.
pub(crate) fn spawn_on<F: Future<Output: 'static> + 'static>(process: Process, future: F) -> Join<F::Output> {
    let slot = Arc::new(Mutex::new((None, None::<Waker>)));
    let filled = Arc::clone(&slot);
    let job: Job = Box::pin(async move {
        let result = future.await;
        let mut slot = filled.lock().unwrap();
        slot.0 = Some(result);
        if let Some(waker) = slot.1.take() {
            waker.wake();
        }
    });
    let refused = with(|world| {
        if !world.processes.contains_key(&process) {
            return Some(job);
        }
        let id = world.number();
        let waker = Arc::new(TaskWaker {
            task: id,
            queued: AtomicBool::new(false),
            woken: Arc::clone(&world.woken),
        });
        waker.wake_by_ref();
        let task = Task {
            process,
            job: Some(job),
            waker,
        };
        world.tasks.insert(id, task);
        None
    });
    drop(refused);
    Join(slot)
}

/// Ends when the clock of the process that made it shows a time.
#[derive(Debug)]
pub(crate) struct Sleep {
    process: Process,
    until: u64,
    timer: Option<u64>,
}

/// Sleeps until the present process's clock shows `until`.
pub(crate) fn sleep_until(until: u64) -> Sleep {
    Sleep {
        process: with(|world| world.current),
        until,
        timer: None,
    }
}

/// Sleeps that long by the present process's clock.
pub(crate) fn sleep(duration: Duration) -> Sleep {
    sleep_until(shown().saturating_add(nanos(duration)))
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        with(|world| {
            let timer = self.timer.unwrap_or_else(|| world.number());
            self.timer = Some(timer);
            let now = world.now;
            let Some(running) = world.processes.get_mut(&self.process) else {
                return Poll::Pending;
            };
            if running.clock.at(now) >= self.until {
                return Poll::Ready(());
            }
            running
                .timers
                .insert((self.until, timer), context.waker().clone());
            Poll::Pending
        })
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let Some(timer) = self.timer else { return };
        // Not dropped while the world is borrowed.
        let waker = with(|world| {
            let running = world.processes.get_mut(&self.process)?;
            running.timers.remove(&(self.until, timer))
        });
        drop(waker);
    }
}
