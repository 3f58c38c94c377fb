// How shares follow the threads' speed: whatever was timed, each unit has one thread, and the slower one has fewer.
#include <cstdio>
#include <cstdlib>

#include "pool.h"

static void check(bool is_right, const char* what) {
    if (is_right) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void shares_are_whole(const Balance& balance, int size) {
    for (int count : {0, 1, 2, 3, 7, 24, 60, 3072}) {
        int at = 0;
        for (int t = 0; t < size; t++) {
            const Share share = balance.share(count, t);
            check(share.begin == at && share.end >= at, "a unit of nobody, or of two");
            at = share.end;
        }
        check(at == count, "units left over");
    }
}

int main() {
    for (int size : {1, 2, 3, 5, 64, 65, 200}) {
        Balance balance;
        for (int step = 0; step < 50; step++) {
            balance.begin(size);
            shares_are_whole(balance, size);
            for (int t = 0; t < size; t++) balance.add(t, (rand() % 1000) * (rand() % 3));
        }
    }
    Balance balance;
    for (int step = 0; step < 200; step++) {  // the first thread takes twice as long for a unit
        balance.begin(2);
        for (int t = 0; t < 2; t++) balance.add(t, (2 - t) * (balance.share(300, t).end - balance.share(300, t).begin));
    }
    const int units = balance.share(300, 0).end;
    check(units >= 98 && units <= 102, "a thread half as quick has another share than a third");
    for (int step = 0; step < 200; step++) balance.begin(2);  // calls that were not timed change nothing
    check(balance.share(300, 0).end == units, "shares moved without a reason");
    balance.begin(3);
    check(balance.share(300, 0).end == 100, "another number of threads begins with equal shares");
    for (int step = 0; step < 500; step++) {  // a thread that never gets to run keeps something to do
        balance.begin(3);
        balance.add(0, 1e6), balance.add(1, 1), balance.add(2, 1);
    }
    const int least = balance.share(300, 0).end;
    check(least >= 35 && least <= 65, "a share below half of an equal one");
    puts("all done");
    return 0;
}
