//! Calls that are made together: one at a time is under way, and what is asked meanwhile goes with the next.
//!
//! So many askers cost about one call per round trip, and each is answered by a call that began after it asked. It is
//! what group commit is to a disk.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// What waits for the next call. Clones share it.
#[derive(Debug)]
pub struct Gather<Q, A> {
    queue: Arc<Mutex<Queue<Q, A>>>,
    weigh: fn(&Q) -> usize,
    most: usize,
}

#[derive(Debug)]
struct Queue<Q, A> {
    waiting: VecDeque<(Q, oneshot::Sender<A>)>,
    /// Somebody calls, and will take what waits.
    called: bool,
}

impl<Q, A> Clone for Gather<Q, A> {
    fn clone(&self) -> Self {
        Self {
            queue: Arc::clone(&self.queue),
            weigh: self.weigh,
            most: self.most,
        }
    }
}

impl<Q: Send + 'static, A: Send + 'static> Gather<Q, A> {
    /// Questions of a call come to no more than `most` by `weigh`, unless it is one alone.
    pub fn new(most: usize, weigh: fn(&Q) -> usize) -> Self {
        let queue = Queue {
            waiting: VecDeque::new(),
            called: false,
        };
        Self {
            queue: Arc::new(Mutex::new(queue)),
            weigh,
            most,
        }
    }

    /// Asks with the next call. Answers have the order of the questions; `None` when the call gave none for this one, in
    /// which case it may have been made all the same. Whoever stops waiting does not take the question back.
    pub async fn ask<C, F>(&self, question: Q, call: C) -> Option<A>
    where
        C: Fn(Vec<Q>) -> F + Send + 'static,
        F: Future<Output = Vec<A>> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let first = {
            let mut queue = self.queue();
            queue.waiting.push_back((question, sender));
            !std::mem::replace(&mut queue.called, true)
        };
        if first {
            tokio::spawn(self.clone().run(call));
        }
        receiver.await.ok()
    }

    async fn run<C, F>(self, call: C)
    where
        C: Fn(Vec<Q>) -> F + Send,
        F: Future<Output = Vec<A>> + Send + 'static,
    {
        // Should a call panic, those that wait are let go, and the next to ask calls anew.
        let mut end = End {
            of: &self,
            early: true,
        };
        while let Some((questions, askers)) = self.next() {
            for (answer, asker) in call(questions).await.into_iter().zip(askers) {
                // Whoever asked may have gone.
                let _ = asker.send(answer);
            }
        }
        end.early = false;
    }

    /// What goes with the next call; none left ends the calling.
    fn next(&self) -> Option<(Vec<Q>, Vec<oneshot::Sender<A>>)> {
        let mut queue = self.queue();
        let (mut weight, mut questions, mut askers) = (0, Vec::new(), Vec::new());
        while let Some((question, asker)) = queue.waiting.pop_front() {
            weight += (self.weigh)(&question);
            if weight > self.most && !questions.is_empty() {
                queue.waiting.push_front((question, asker));
                break;
            }
            questions.push(question);
            askers.push(asker);
        }
        queue.called = !questions.is_empty();
        queue.called.then_some((questions, askers))
    }
}

impl<Q, A> Gather<Q, A> {
    fn queue(&self) -> MutexGuard<'_, Queue<Q, A>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets go of all that wait if the calling ends early.
struct End<'a, Q, A> {
    of: &'a Gather<Q, A>,
    early: bool,
}

impl<Q, A> Drop for End<'_, Q, A> {
    fn drop(&mut self) {
        if self.early {
            let mut queue = self.of.queue();
            queue.waiting.clear();
            queue.called = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    const BROKEN: u32 = u32::MAX;

    /// Calls that each wait for a permit, and say which call answered and what was asked with it.
    struct Calls {
        made: Arc<AtomicUsize>,
        may_end: Arc<Semaphore>,
    }

    impl Calls {
        fn new() -> Self {
            Self {
                made: Arc::default(),
                may_end: Arc::new(Semaphore::new(0)),
            }
        }

        fn ask(
            &self,
            gather: &Gather<u32, (usize, u32)>,
            question: u32,
        ) -> tokio::task::JoinHandle<Option<(usize, u32)>> {
            let (made, may_end, gather) = (Arc::clone(&self.made), Arc::clone(&self.may_end), gather.clone());
            tokio::spawn(async move {
                let call = move |questions: Vec<u32>| {
                    let (number, may_end) = (made.fetch_add(1, Ordering::SeqCst), Arc::clone(&may_end));
                    async move {
                        may_end.acquire().await.unwrap().forget();
                        assert!(!questions.contains(&BROKEN), "a call that panics");
                        questions.into_iter().map(|question| (number, question)).collect()
                    }
                };
                gather.ask(question, call).await
            })
        }

        async fn under_way(&self, count: usize) {
            while self.made.load(Ordering::SeqCst) < count {
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test]
    async fn what_comes_during_a_call_goes_with_the_next() {
        let (calls, gather) = (Calls::new(), Gather::new(100, |_| 1));
        let first = calls.ask(&gather, 1);
        calls.under_way(1).await;
        let later: Vec<_> = (2..50).map(|question| calls.ask(&gather, question)).collect();
        while gather.queue().waiting.len() < later.len() {
            tokio::task::yield_now().await;
        }
        calls.may_end.add_permits(2);
        assert_eq!(first.await.unwrap(), Some((0, 1)));
        let mut seen = Vec::new();
        for asked in later {
            let (call, question) = asked.await.unwrap().unwrap();
            assert_eq!(call, 1, "all in one call that began after they asked");
            seen.push(question);
        }
        assert_eq!(seen, (2..50).collect::<Vec<_>>(), "each its own answer");
        assert_eq!(calls.made.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn a_call_is_bounded_and_one_alone_may_be_more() {
        let (calls, gather) = (Calls::new(), Gather::new(10, |weight| *weight as usize));
        let first = calls.ask(&gather, 1);
        calls.under_way(1).await;
        let mut later = Vec::new();
        for weight in [6, 4, 99, 5] {
            later.push(calls.ask(&gather, weight));
            while gather.queue().waiting.len() < later.len() {
                tokio::task::yield_now().await;
            }
        }
        calls.may_end.add_permits(9);
        assert_eq!(first.await.unwrap().unwrap().0, 0);
        let mut by = Vec::new();
        for asked in later {
            by.push(asked.await.unwrap().unwrap().0);
        }
        assert_eq!(by, [1, 1, 2, 3]);
    }

    #[tokio::test]
    async fn a_panic_strands_nobody() {
        let (calls, gather) = (Calls::new(), Gather::new(100, |_| 1));
        let broken = calls.ask(&gather, BROKEN);
        calls.under_way(1).await;
        let behind = calls.ask(&gather, 2);
        while gather.queue().waiting.is_empty() {
            tokio::task::yield_now().await;
        }
        calls.may_end.add_permits(1);
        assert_eq!((broken.await.unwrap(), behind.await.unwrap()), (None, None));
        calls.may_end.add_permits(1);
        assert_eq!(calls.ask(&gather, 3).await.unwrap(), Some((1, 3)));
    }
}
