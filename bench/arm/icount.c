/* A plugin of qemu-user that counts the instructions a program executes: `symbol=NAME,out=FILE[,trace=FILE,skip=N,length=N]`.
 *
 * out: a line for each executed instruction of functions whose name contains NAME: address, times, function; without a
 * NAME of all of the program, with ? as the function of code without a symbol.
 * trace: the addresses of `length` of them in the order of execution, from the `skip`-th on.
 * The declarations are those of qemu's plugin interface, version 1. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*translated)(uint64_t id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *, int add, void *to, uint64_t value);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*executed)(unsigned cpu, void *data), int flags, void *data);
void qemu_plugin_register_atexit_cb(uint64_t id, void (*ended)(uint64_t id, void *data), void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t index);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
const char *qemu_plugin_insn_symbol(const struct qemu_plugin_insn *);
uint64_t qemu_plugin_start_code(void);
uint64_t qemu_plugin_end_code(void);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

typedef struct Instruction {
  uint64_t address, times;
  const char *function;
  struct Instruction *next;
} Instruction;

enum { BUCKETS = 1 << 16 };
static Instruction *table[BUCKETS];
static char symbol[256];
static FILE *out, *trace;
static uint64_t seen, skip, length;

static Instruction *find(uint64_t address, const char *function) {
  Instruction **bucket = &table[address / 2 % BUCKETS];
  for (Instruction *i = *bucket; i; i = i->next)
    if (i->address == address) return i;
  Instruction *made = calloc(1, sizeof *made);
  if (!made) abort();
  made->address = address, made->function = function, made->next = *bucket;
  return *bucket = made;
}

static void executed(unsigned cpu, void *data) {
  (void)cpu;
  uint64_t now = seen++;
  if (now >= skip && now - skip < length) fprintf(trace, "%" PRIx64 "\n", ((Instruction *)data)->address);
}

static void translated(uint64_t id, struct qemu_plugin_tb *block) {
  (void)id;
  for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); i++) {
    struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(block, i);
    uint64_t address = qemu_plugin_insn_vaddr(instruction);
    if (address < qemu_plugin_start_code() || address >= qemu_plugin_end_code()) continue;
    const char *function = qemu_plugin_insn_symbol(instruction);
    if (!strstr(function && *function ? function : "?", symbol)) continue;
    Instruction *found = find(address, function && *function ? function : "?");
    qemu_plugin_register_vcpu_insn_exec_inline(instruction, 0, &found->times, 1);
    if (trace) qemu_plugin_register_vcpu_insn_exec_cb(instruction, executed, 0, found);
  }
}

static void ended(uint64_t id, void *data) {
  (void)id, (void)data;
  for (int b = 0; b < BUCKETS; b++)
    for (Instruction *i = table[b]; i; i = i->next)
      if (i->times) fprintf(out, "%" PRIx64 " %" PRIu64 " %s\n", i->address, i->times, i->function);
  fclose(out);
  if (trace) fclose(trace);
}

__attribute__((visibility("default"))) int qemu_plugin_install(uint64_t id, const void *info, int count, char **words) {
  (void)info;
  for (int i = 0; i < count; i++) {
    char *value = strchr(words[i], '=');
    if (!value) return 1;
    *value++ = 0;
    if (!strcmp(words[i], "symbol")) snprintf(symbol, sizeof symbol, "%s", value);
    else if (!strcmp(words[i], "out")) out = fopen(value, "w");
    else if (!strcmp(words[i], "trace")) trace = fopen(value, "w");
    else if (!strcmp(words[i], "skip")) skip = strtoull(value, NULL, 10);
    else if (!strcmp(words[i], "length")) length = strtoull(value, NULL, 10);
    else return 1;
  }
  if (!out) return 1;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
